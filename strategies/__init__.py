"""Flower strategies that average sparse values. Installed as `fedpet.strategies`."""

from .metered import Metered
from .sparse import SparseFedAvg

__all__ = ["Metered", "SparseFedAvg"]
