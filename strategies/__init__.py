"""Aggregate the clients' values by Flower's strategies, made with plain keywords.

    import fedpet

    strategy = fedpet.strategies.FedAdam(server_learning_rate=0.01, clients_per_round=10)

The same as a table of an experiment: `[strategy]` with `name = "fedadam"`. Installed as
`fedpet.strategies`; Flower and torch are loaded when a strategy is bound to a run.
"""

from typing import TYPE_CHECKING, Any

from .fedavg import FedAvg, FedProx
from .fedopt import FedAdagrad, FedAdam, FedAvgM, FedYogi
from .robust import Bulyan, FedMedian, FedTrimmedAvg, Krum, MultiKrum

from .qfedavg import QFedAvg  # isort: skip  # rules are named and explained in this order
from .strategy import Strategy, register, wrap

if TYPE_CHECKING:
    from .structure_search import StructureSearch

__all__ = [
    "Bulyan",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedMedian",
    "FedProx",
    "FedTrimmedAvg",
    "FedYogi",
    "Krum",
    "MultiKrum",
    "QFedAvg",
    "Strategy",
    "StructureSearch",
    "register",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name != "StructureSearch":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .structure_search import StructureSearch

    globals()[name] = StructureSearch
    return StructureSearch


def __dir__() -> list[str]:
    return [*__all__]
