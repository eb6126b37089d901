"""A federation without a model: real nodes, requests and strategies, training by a formula."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_training
import numpy as np
import pytest
import torch
from flwr.app import Message

from fedpet.client import train_client as client_module
from fedpet.client.model_cache import LoadedPlan, ModelCache
from fedpet.client.node import Node
from fedpet.client.node_config import NodeConfig
from fedpet.config import (
    BackboneConfig,
    ClientsConfig,
    CodecConfig,
    DataConfig,
    MaskConfig,
    StrategyConfig,
    TrainingConfig,
)
from fedpet.pet.layout import Segment
from fedpet.pet.tiers import tiers_of
from fedpet.protocol.ledger import Ledger
from fedpet.protocol.plan import Plan
from fedpet.run.local_grid import LocalGrid
from fedpet.server.aggregation import from_arrays, to_arrays
from fedpet.server.client_pool import ClientPool
from fedpet.server.rounds import SparseStrategy
from fedpet.training.loop import TrainResult
from fedpet.utils.seeds import client_id64, derive_seed

CLIENTS = tuple(f"client {letter}" for letter in "abcdefgh")
ROWS = {name: 3 + 2 * index for index, name in enumerate(CLIENTS)}
NUMBERS = {client_id64(name): name for name in CLIENTS}
SEED = 11
TWO_TIERS = MaskConfig(density=0.02, tiers=("0.005=0.5", "0.02=0.5"))


def layout(*sizes: tuple[str, str, int]) -> tuple[Segment, ...]:
    """Segments side by side, from (kind, name, size)."""
    stops = np.cumsum([size for *_, size in sizes]).tolist()
    return tuple(
        Segment(kind, name, stop - size, size)
        for (kind, name, size), stop in zip(sizes, stops, strict=True)
    )


WHOLE = layout(("mask", "a", 240), ("mask", "b", 80), ("lnfit", "n", 40), ("head", "h", 60))
WEAK = layout(("mask", "a", 30), ("mask", "b", 10), ("lnfit", "n", 40), ("head", "h", 60))
NUM_VALUES = 420


def make_plan(codec: CodecConfig, mask: MaskConfig | None = None) -> Plan:
    """A plan of `NUM_VALUES` values that belongs to no model."""
    return fake_training.make_plan(
        codec=codec,
        mask=mask,
        num_values=NUM_VALUES,
        training=TrainingConfig(learning_rate=1e-3),
        seed=SEED,
    )


class FakePet:
    """Values of a layout, and nothing else of a model."""

    def __init__(self, plan: Plan) -> None:
        several = plan.mask is not None and len(plan.mask.tiers) > 1
        self.tiers = (WEAK, WHOLE) if several else (WHOLE,)
        self.model = self
        self.after_step = None
        self.set_tier(len(self.tiers) - 1)

    def set_tier(self, tier: int) -> None:
        self.segments = self.tiers[tier]
        self.num_values = sum(segment.size for segment in self.segments)

    def parameter_groups(self) -> dict[str, Any]:
        return {}

    def sent_values(self) -> tuple[list[Any], list[Any]]:
        return [], []

    def set_delta(self, values: torch.Tensor, *, seed: int) -> None:
        self._values = values.clone()

    def get_delta(self) -> torch.Tensor:
        return self._values

    def train(self, client: int, seed: int) -> None:
        own = np.random.default_rng(derive_seed("target", client)).normal(size=self.num_values)
        noise = np.random.default_rng(seed).normal(size=self.num_values)
        pull = torch.from_numpy((own + 0.1 * noise).astype(np.float32))
        self._values += 0.2 * (pull - self._values)


class FakeModels(ModelCache):
    """A cache whose models are `FakePet`s."""

    def load(self, digest: bytes) -> LoadedPlan:
        plan = Plan.from_bytes(self._plans.get(digest))
        rows = {number: np.array([number], dtype=np.uint64) for number in NUMBERS}
        pet: Any = FakePet(plan)
        data: Any = SimpleNamespace(train=None)
        return LoadedPlan(digest, plan, pet, data, rows)


class FakeNode(Node):
    """A node whose model is a `FakePet`; use it under `train_by_formula`."""

    def __init__(self, config: NodeConfig) -> None:
        super().__init__(config)
        self.models = FakeModels(config, self.plans)


def train_by_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the formula in the place of local training."""

    def train(
        pet: FakePet, groups: Any, rows: Any, indices: np.ndarray, *args: Any, **named: Any
    ) -> TrainResult:
        number = int(indices[0])
        pet.train(number, named["seed"])
        return TrainResult(ROWS[NUMBERS[number]], 0.5, 0.0)

    monkeypatch.setattr(client_module, "train_rows", train)


def node_settings(cache: Path) -> NodeConfig:
    return NodeConfig(
        backbone=BackboneConfig(), data=DataConfig(), population=ClientsConfig(), cache=cache
    )


class Forgetful:
    """A device whose process ends after every message: its disk is all that it remembers."""

    def __init__(self, cache: Path) -> None:
        self._settings = node_settings(cache)

    def answer(self, payload: bytes) -> bytes:
        return FakeNode(self._settings).answer(payload)


def make_strategy(plan: Plan, **changes: Any) -> SparseStrategy:
    settings: dict[str, Any] = {"clients_per_round": 5, **changes}
    return SparseStrategy(
        plan=plan,
        tiers=tiers_of(FakePet(plan), plan.mask),  # type: ignore[arg-type]
        population=ClientPool(ROWS, homes=settings.pop("homes", {})),
        config=StrategyConfig(**settings),
        ledger=Ledger(),
    )


Handler = Callable[[bytes], bytes]


class Shuffled(LocalGrid):
    """Nodes whose replies come in a seeded disorder."""

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        replies = list(super().pull_messages(message_ids))
        generator = np.random.default_rng(len(replies))
        return [replies[index] for index in generator.permutation(len(replies))]


def start(
    strategy: SparseStrategy,
    handlers: dict[int, Handler],
    num_rounds: int,
    values: np.ndarray | None = None,
) -> np.ndarray:
    """Run rounds, and give the values that they come to; the old ones where none was averaged."""
    before = np.zeros(NUM_VALUES, dtype=np.float32) if values is None else values
    result = strategy.start(
        Shuffled(handlers), to_arrays(before), num_rounds=num_rounds, timeout=60.0
    )
    return from_arrays(result.arrays) if result.arrays else before
