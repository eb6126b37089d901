"""Flower's strategies over the sparse values of a plan. Installed as `fedpet.strategies`."""

from fedpet.server.arrays import from_arrays, to_arrays
from fedpet.server.metering import LedgerMixin
from fedpet.server.node_registry import NodeRegistry
from fedpet.server.rounds import MeanAggregation, PerClientAggregation
from fedpet.server.tier_assignment import TierAssignment

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

__all__ = [
    "STRATEGIES",
    "LedgerMixin",
    "MeanAggregation",
    "NodeRegistry",
    "PerClientAggregation",
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
    "TierAssignment",
    "from_arrays",
    "to_arrays",
]
