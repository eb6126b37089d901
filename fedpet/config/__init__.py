"""What a user may set: the stages, their keys, and an experiment of all of them."""

from fedpet.config.experiment import Experiment, Scalar
from fedpet.config.schema import (
    DEVICES,
    MAX_TIERS,
    BackboneConfig,
    CodecConfig,
    DataConfig,
    MaskConfig,
    PopulationConfig,
    RunConfig,
    SearchConfig,
    StrategyConfig,
    StructureConfig,
    TrainingConfig,
)

__all__ = [
    "DEVICES",
    "MAX_TIERS",
    "BackboneConfig",
    "CodecConfig",
    "DataConfig",
    "Experiment",
    "MaskConfig",
    "PopulationConfig",
    "RunConfig",
    "Scalar",
    "SearchConfig",
    "StrategyConfig",
    "StructureConfig",
    "TrainingConfig",
]
