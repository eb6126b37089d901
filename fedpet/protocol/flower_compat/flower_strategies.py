"""Save and load what Flower's strategies hold between rounds, and spare them what costs time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app.message import arrayrecord

from fedpet.protocol.flower_compat.replaced import replaced

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Strategy

__all__ = ["load_optimizer_state", "optimizer_state", "without_collections"]


def optimizer_state(strategy: Strategy) -> dict[str, np.ndarray]:
    """Return the vectors of a server optimiser by Flower's names, without those not made yet.

    Flower has no way to save them. A strategy that has `state()` and `load_state()` of its own is
    asked instead.
    """
    if hasattr(strategy, "state"):
        return dict(strategy.state())
    return {
        name: next(iter(held.values())) if isinstance(held, dict) else held[0]
        for name in _vectors(strategy)
        if (held := getattr(strategy, name))
    }


def load_optimizer_state(
    strategy: Strategy, state: Mapping[str, np.ndarray], array_name: str
) -> None:
    """Go back to an `optimizer_state`; to the beginning where a vector is not in it."""
    if hasattr(strategy, "load_state"):
        strategy.load_state(state)
        return
    for name, kind in _vectors(strategy).items():
        vector = state.get(name)
        held: Any = None
        if vector is not None:
            held = {array_name: vector} if kind is dict else [vector]
        setattr(strategy, name, held)
    # Flower's optimisers hold the global values too, and take them from the next round's.
    vars(strategy)["current_arrays"] = None


def _vectors(strategy: Strategy) -> dict[str, type]:
    """Return Flower's attributes that hold vectors: in a dict by array, or in a list."""
    from flwr.serverapp.strategy import FedAvgM  # devices go without: they never aggregate
    from flwr.serverapp.strategy.fedopt import FedOpt

    if isinstance(strategy, FedOpt):
        return {"m_t": dict, "v_t": dict}
    return {"momentum_vector": list} if isinstance(strategy, FedAvgM) else {}


@contextmanager
def without_collections() -> Iterator[None]:
    """Leave out the garbage collections that Flower asks for, with some rules one a reply.

    Each goes through the round's messages, of which there is one a client.
    """
    with replaced(arrayrecord, gc=SimpleNamespace(collect=lambda: 0)):
        yield
