"""Flower's strategies over the sparse values of a plan. Installed as `fedpet.strategies`."""

from .arrays import to_arrays, values_of
from .metered import Metered
from .roll_call import RollCall
from .rounds import MeanRounds, VectorRounds
from .rules import (
    STRATEGIES,
    SparseBulyan,
    SparseFedAdagrad,
    SparseFedAdam,
    SparseFedAvg,
    SparseFedAvgM,
    SparseFedMedian,
    SparseFedProx,
    SparseFedTrimmedAvg,
    SparseFedYogi,
    SparseKrum,
    SparseMultiKrum,
    SparseQFedAvg,
    SparseStrategy,
)
from .structure_search import StructureSearch
from .tiers import TierBook

__all__ = [
    "STRATEGIES",
    "MeanRounds",
    "Metered",
    "RollCall",
    "SparseBulyan",
    "SparseFedAdagrad",
    "SparseFedAdam",
    "SparseFedAvg",
    "SparseFedAvgM",
    "SparseFedMedian",
    "SparseFedProx",
    "SparseFedTrimmedAvg",
    "SparseFedYogi",
    "SparseKrum",
    "SparseMultiKrum",
    "SparseQFedAvg",
    "SparseStrategy",
    "StructureSearch",
    "TierBook",
    "VectorRounds",
    "to_arrays",
    "values_of",
]
