"""Multiply in a step that forms no dense weight gradient: index, recomputation, matmul."""
