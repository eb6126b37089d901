"""Atomic writes, seeds, formatting."""
