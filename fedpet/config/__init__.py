"""Define what a user may set: the stages, their keys, and an experiment of all of them."""

from fedpet.config.client_evaluation import ClientEvaluation
from fedpet.config.experiment import Experiment, Scalar
from fedpet.config.schema import (
    DEVICES,
    MAX_TIERS,
    BackboneConfig,
    ClientsConfig,
    CodecConfig,
    DataConfig,
    MaskConfig,
    RunConfig,
    SearchConfig,
    StructureConfig,
    TrainingConfig,
)
from fedpet.config.strategy_registry import StrategyConfig

__all__ = [
    "DEVICES",
    "MAX_TIERS",
    "BackboneConfig",
    "ClientEvaluation",
    "ClientsConfig",
    "CodecConfig",
    "DataConfig",
    "Experiment",
    "MaskConfig",
    "RunConfig",
    "Scalar",
    "SearchConfig",
    "StrategyConfig",
    "StructureConfig",
    "TrainingConfig",
]
