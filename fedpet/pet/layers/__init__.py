"""Compute adapted layers, forward and backward, and put them in the place of plain ones."""
