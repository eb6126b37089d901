"""Flower strategies that average sparse values. Installed as `fedpet.strategies`."""

from .arrays import to_arrays, values_of
from .metered import Metered
from .rules import SparseFedAvg

__all__ = ["Metered", "SparseFedAvg", "to_arrays", "values_of"]
