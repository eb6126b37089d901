"""A federation without a model: clients whose updates are a formula, in real frames."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from flwr.app import Message
from sending import codec_of

from fedpet.codec import decode_values, encode_values
from fedpet.config import StrategyConfig, TrainingConfig
from fedpet.data import Task
from fedpet.pet.structure import Structure
from fedpet.pet.tiers import Tier
from fedpet.protocol.codec_seeds import uplink_seeds
from fedpet.protocol.frame import Frame, pack_frame, unpack_frames
from fedpet.protocol.ledger import Ledger
from fedpet.protocol.plan import Plan
from fedpet.protocol.request import read_request
from fedpet.run.local_grid import LocalGrid
from fedpet.server.client_pool import ClientPool
from fedpet.server.rounds import SparseStrategy
from fedpet.utils.seeds import client_id64, derive_seed

NUM_VALUES = 61
CLIENTS = tuple(f"client {letter}" for letter in "abcdefghijk")  # 11: Bulyan with 2 liars
ROWS = {name: 3 + 2 * index for index, name in enumerate(CLIENTS)}
NAMES = {client_id64(name): name for name in CLIENTS}
PARAMETERS: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "fedprox": {},
    "fedavgm": {"server_learning_rate": 0.7, "server_momentum": 0.6},
    "fedadam": {"server_learning_rate": 0.02, "beta_1": 0.8, "beta_2": 0.95, "tau": 1e-2},
    "fedyogi": {"server_learning_rate": 0.02, "beta_1": 0.8, "beta_2": 0.95, "tau": 1e-2},
    "fedadagrad": {"server_learning_rate": 0.02, "tau": 1e-2},
    "fedmedian": {},
    "fedtrimmedavg": {"trim_fraction": 0.3},
    "krum": {"num_malicious": 2},
    "multikrum": {"num_malicious": 2, "num_selected": 4},
    "bulyan": {"num_malicious": 2},
    "qfedavg": {"q": 0.3, "client_learning_rate": 0.1},
}

Change = Callable[[Frame], bytes]


def make_plan(**changes: Any) -> Plan:
    """A plan of `NUM_VALUES` values that belongs to no model."""
    fields: dict[str, Any] = {
        "fingerprint": "0" * 64,
        "head_seed": 0,
        "task": Task("classification", ("bad", "good"), "accuracy"),
        "max_length": 8,
        "tokenizer_hash": "",
        "mask": None,
        "mask_sha256": "",
        "mask_positions": b"",
        "structure": Structure(()),
        "num_values": NUM_VALUES,
        "layout": "",
        "codec": codec_of(),
        "training": TrainingConfig(learning_rate=1e-3, proximal_mu=0.5),
        "num_rounds": 4,
        "seed": 11,
    }
    return Plan(**{**fields, **changes})


def make_strategy(name: str, plan: Plan | None = None, **changes: Any) -> SparseStrategy:
    """A strategy over all clients, with parameters that are not Flower's defaults."""
    plan = plan or make_plan()
    settings = {"clients_per_round": len(CLIENTS), **PARAMETERS[name], **changes}
    return SparseStrategy(
        plan=plan,
        tiers=[Tier(0.0, 1.0, slice(None), plan.num_values, [(0, plan.num_values)])],
        population=ClientPool(ROWS, homes={}),
        config=StrategyConfig(name=name, **settings),
        ledger=Ledger(),
    )


def update_of(client: str, server_round: int, values: np.ndarray) -> tuple[np.ndarray, float]:
    """Return a client's training: a pull to a point of its own, some noise, and its loss."""
    own = np.random.default_rng(derive_seed("target", client))
    noise = np.random.default_rng(derive_seed("noise", client, server_round))
    target = own.normal(size=len(values))
    update = 0.3 * (target - values) + 0.05 * noise.normal(size=len(values))
    return update.astype(np.float32), float(np.square(target - values).mean())


def answer(payload: bytes, change: Change = pack_frame) -> bytes:
    """A node's answer: a frame for each client of the cohort."""
    request = read_request(payload)
    asked = next(unpack_frames(request.frame, max_frames=1, max_payload_bytes=1 << 28))
    assert isinstance(asked, Frame)
    groups = [(0, asked.count)]
    seed = derive_seed("downlink", 11, asked.server_round)
    values = decode_values(asked.payload, asked.codec, groups, seed=seed)
    frames = []
    for number in request.clients:
        update, loss = update_of(NAMES[number], asked.server_round, values)
        frame = Frame(
            plan_digest=asked.plan_digest,
            server_round=asked.server_round,
            client=number,
            codec=asked.codec,
            count=asked.count,
            num_examples=ROWS[NAMES[number]],
            loss=loss,
            train_seconds=0.0,
            payload=encode_values(update, asked.codec, groups, seed=0),
        )
        frames.append(change(frame))
    return b"".join(frames)


class ShuffledGrid(LocalGrid):
    """Nodes whose replies come in a seeded disorder."""

    def __init__(self, num_nodes: int, seed: int = 0, change: Change = pack_frame) -> None:
        super().__init__({n + 1: lambda payload: answer(payload, change) for n in range(num_nodes)})
        self._generator = np.random.default_rng(seed)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        replies = list(super().pull_messages(message_ids))
        return [replies[index] for index in self._generator.permutation(len(replies))]


def frame_of(number: int, update: np.ndarray, groups: list[tuple[int, int]]) -> bytes:
    """A frame of round 1, of no plan, with seed 0."""
    seed = uplink_seeds(0, 1, number)["seed"]
    return pack_frame(
        Frame(
            plan_digest=bytes(16),
            server_round=1,
            client=number,
            codec="float32",
            count=len(update),
            num_examples=1,
            loss=0.0,
            train_seconds=0.0,
            payload=encode_values(update, "float32", groups, seed=seed),
        )
    )
