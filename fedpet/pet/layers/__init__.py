"""Adapted layers: their forward and backward passes, and how they are put in place."""
