"""Command line: a thin layer on the public API. Nothing imports it."""
