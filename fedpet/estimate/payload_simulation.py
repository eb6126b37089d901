"""Measure payloads on made-up updates, encoded by the run's own codec.

A codec without an entropy stage writes as many bytes whatever the values are. With one, the length
depends on the values' distribution: of floats on exponents and trailing zeros, of quantised symbols
on the tails. A client's first step of AdamW moves every value by the learning rate, nearly to the
bit, and compresses to 60 % of ten steps; a change added to a value a hundred times its size keeps
seven bits less. So the federation is played through on random gradients: the run's own optimiser
and codecs, Flower's own rule on the server, a share of the values, rounds and clients.

Gradients are independent normal numbers, the same for all kinds of values: on the recorded runs of
benchmarks/results that foresees the bytes as well as the sizes and correlations of a real model's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import ConfigRecord
from flwr.serverapp.strategy import Strategy

from fedpet.codec import VectorCodec, parse_codec
from fedpet.config import StrategyConfig, TrainingConfig
from fedpet.estimate.participants import Participant
from fedpet.protocol.flower_compat.flower_simulation import quiet_flower
from fedpet.protocol.plan import Plan
from fedpet.protocol.shared_reference import Reference, encode_full
from fedpet.server.aggregation import aggregate, to_arrays, train_message
from fedpet.server.rounds import make_rule
from fedpet.training.optimizer import make_optimizer

__all__ = ["Kinds", "Payloads", "is_fixed", "local_steps", "payloads"]

Kinds = Sequence[tuple[str, int]]  # kind and number of the values of each group, in order
Floats = npt.NDArray[np.float32]

# The part that is played through; beyond it, lengths are scaled (values) or interpolated (rounds).
MAX_VALUES = 1 << 16
MAX_ROUNDS = 12
MAX_CLIENTS = 8
MAX_STEPS = 16
MAX_MOVES = 50  # of the server, between two rounds that are played through
LEAST_VALUES = 4096  # of a kind, where it has as many: a window of a rotation

GRADIENT, SPREAD = 1e-3, 0.35  # its standard deviation, and how that varies by entry, in decades
SIGNAL = np.float32(0.1)  # shared by steps and clients of a round, relative to the rest


@dataclass(frozen=True)
class Payloads:
    """Mean lengths of payloads in bytes, float64 (rounds, tiers).

    Attributes:
        up: Of a client's update.
        down: Of the server's values, or of their reference's change.
        whole: Of a reference itself; zeros where nobody is sent one.
    """

    up: npt.NDArray[np.float64]
    down: npt.NDArray[np.float64]
    whole: npt.NDArray[np.float64]


def is_fixed(*codecs: str) -> bool:
    """Tell whether payloads of these codecs have one length, whatever the values are."""
    parsed = [parse_codec(codec) for codec in codecs if codec]
    return not any(codec.entropy or codec.topk_ppm for codec in parsed)


def local_steps(num_rows: int, training: TrainingConfig) -> int:
    """Return the optimiser steps of a client that holds this many rows."""
    return training.local_epochs * math.ceil(num_rows / training.batch_size)


def payloads(
    tiers: Sequence[Kinds],
    plan: Plan,
    strategy: StrategyConfig,
    rounds: Sequence[Sequence[Participant]],
    *,
    seed: int = 0,
) -> Payloads:
    """Play a federation through on random gradients, and measure its payloads.

    Args:
        tiers: The values of each, weakest first: they differ in the size of the group "mask".
        plan: Codecs, downlink, training settings.
        strategy: The rule on the server.
        rounds: The clients of each.
        seed: Of the gradients.
    """
    codec, whole = plan.codec, plan.is_delta_downlink
    up, down = (codec.uplink, codec.head_uplink), (codec.downlink, codec.head_downlink)
    measured = (not is_fixed(*up), not is_fixed(*down), whole)
    lengths = np.zeros((3, len(rounds), len(tiers)))
    for tier, kinds in enumerate(tiers):
        for way, its in enumerate((plan.uplink, plan.downlink)):
            lengths[way, :, tier] = _codec(its, kinds).max_payload_bytes
    if not any(measured):
        return Payloads(*lengths)
    last = len(rounds)  # the first round sends zeros, and is like no other; the others evenly
    later = np.linspace(min(2, last), last, MAX_ROUNDS - 1).round().astype(int).tolist()
    played = sorted({1, *later})
    federation = _Federation(tiers, plan, strategy, seed)
    found = np.array(
        [
            federation.play(r, rounds[r - 1], until - r)
            for r, until in zip(played, [*played[1:], last + 1], strict=True)
        ]
    )  # (played, 3, tiers); NaN where no client of a tier took part
    for way, tier in np.argwhere(~np.isnan(found).all(axis=0)):
        if measured[way]:
            there = ~np.isnan(found[:, way, tier])
            lengths[way, :, tier] = np.interp(
                np.arange(1, last + 1), np.array(played)[there], found[there, way, tier]
            )
    return Payloads(*lengths)


class _Federation:
    """Move a few thousand values as a run does."""

    def __init__(
        self, tiers: Sequence[Kinds], plan: Plan, strategy: StrategyConfig, seed: int
    ) -> None:
        self._plan, self._strategy = plan, strategy
        self._rule = make_rule(strategy, plan.training)
        self._random = np.random.default_rng(seed)
        share = min(MAX_VALUES / sum(size for _, size in tiers[-1]), 1)
        self._kinds = [(k, max(min(n, LEAST_VALUES), round(share * n))) for k, n in tiers[-1]]
        count = sum(size for _, size in self._kinds)
        sizes = GRADIENT * 10 ** (SPREAD * self._random.standard_normal(count))
        self._sizes = torch.from_numpy(sizes.astype(np.float32))  # of each entry's gradient
        self._values = np.zeros(count, dtype=np.float32)  # the server's
        self._reference = self._values  # from which clients train
        # Of a tier: its values, their codecs, and how many values stand for one of them.
        self._tiers: list[tuple[npt.NDArray[np.bool_], VectorCodec, VectorCodec, float]] = []
        for tier in tiers:
            own = [
                max(1, round(size * its / of_all))
                for (_, size), (_, its), (_, of_all) in zip(
                    self._kinds, tier, tiers[-1], strict=True
                )
            ]  # as in a run, the front of a mask's ranking
            pairs = zip(self._kinds, own, strict=True)
            where = np.concatenate([np.arange(size) < its for (_, size), its in pairs])
            kinds = [(kind, its) for (kind, _), its in zip(tier, own, strict=True)]
            up, down = _codec(plan.uplink, kinds), _codec(plan.downlink, kinds)
            self._tiers.append((where, up, down, sum(size for _, size in tier) / sum(own)))

    def play(
        self, server_round: int, takers: Sequence[Participant], num_rounds: int
    ) -> npt.NDArray[np.float64]:
        """Play one round, with some of its clients for all.

        Args:
            server_round: From 1.
            takers: The round's clients.
            num_rounds: How many rounds it stands for.

        Returns:
            Mean lengths as of all values: up, down, of a whole reference. float64 (3, tiers).
        """
        lengths = np.full((3, len(self._tiers)), np.nan)
        lengths[1:] = self._send_down(server_round)
        signal = SIGNAL * self._normal()
        total, weight = (np.zeros(len(self._values)) for _ in range(2))
        up: dict[int, list[float]] = {}
        chosen = _representatives(takers, server_round)
        for taker in chosen:
            where, coding, _, scale = self._tiers[taker.tier]
            seed = self._plan.seed + taker.client + server_round
            payload = coding.encode(self._update(taker, signal, server_round)[where], seed=seed)
            total[where] += coding.decode(payload, seed=seed)
            weight[where] += 1
            up.setdefault(taker.tier, []).append(scale * len(payload))
        lengths[0, list(up)] = [np.mean(each) for each in up.values()]
        # A mean of independent updates is the smaller the more there are.
        averaged = min(max(self._strategy.num_averaged(len(takers)), 1), len(takers))
        mean = total / np.maximum(weight, 1) * math.sqrt(len(chosen) / averaged)
        self._move(mean.astype(np.float32), server_round, num_rounds)
        return lengths

    def _send_down(self, server_round: int) -> npt.NDArray[np.float64]:
        changes = self._plan.is_delta_downlink
        start = self._reference if changes else np.zeros_like(self._values)
        lengths = np.zeros((2, len(self._tiers)))
        for tier, (where, _, coding, scale) in enumerate(self._tiers):  # the last has all values
            payload = coding.encode((self._values - start)[where], seed=server_round)
            lengths[0, tier] = scale * len(payload)
        self._reference = start + coding.decode(payload, seed=server_round)
        for tier, (where, _, _, scale) in enumerate(self._tiers if changes else ()):
            whole = encode_full(Reference(server_round, self._reference[where]))
            lengths[1, tier] = scale * len(whole)
        return lengths

    def _update(self, taker: Participant, signal: Floats, server_round: int) -> Floats:
        """Return one client's update, by the run's own optimiser."""
        training = self._plan.training
        values = torch.from_numpy(self._reference.copy())
        parts = values.split([size for _, size in self._kinds])
        groups: dict[str, list[Any]] = {}
        for (kind, _), part in zip(self._kinds, parts, strict=True):
            groups.setdefault(kind, []).append(part)
        factor = self._plan.rate_factor(server_round)
        optimiser = make_optimizer(
            groups,
            lambda kind: training.rate_of(kind) * factor,
            name=training.optimizer,
            weight_decay=training.weight_decay,
        )
        for _ in range(min(local_steps(taker.num_rows, training), MAX_STEPS)):
            gradient = torch.from_numpy(self._normal() + signal) * self._sizes
            for part, its in zip(parts, gradient.split([len(p) for p in parts]), strict=True):
                part.grad = its
            optimiser.step()
        return values.numpy() - self._reference

    def _normal(self) -> Floats:
        return self._random.standard_normal(len(self._values), dtype=np.float32)

    def _move(self, mean: Floats, server_round: int, num_rounds: int) -> None:
        """Move the server's values as `num_rounds` rounds would: they hardly correlate."""
        moves = min(num_rounds, MAX_MOVES)
        more = np.float32(math.sqrt(num_rounds / moves))
        for index in range(moves):
            step = mean
            if self._strategy.has_server_optimizer:
                step = server_step(self._rule, self._values, mean, server_round + index)
            self._values = self._values + more * step
            mean = mean * self._random.choice(np.array([-1, 1], dtype=np.float32), len(mean))


def server_step(rule: Strategy, values: Floats, mean: Floats, server_round: int) -> Floats:
    """Return the step that Flower's rule makes of a mean update."""
    reply = train_message(values + mean, weight=1, loss=0.0)
    with quiet_flower():
        rule.configure_train(server_round, to_arrays(values), ConfigRecord(), None)  # type: ignore[arg-type]  # no grid: nobody is sampled
        return aggregate(rule, server_round, values, [reply])[0] - values


def _codec(way: Any, kinds: Kinds) -> VectorCodec:
    """Return `Plan.uplink` or `Plan.downlink` of these groups."""
    stops = np.cumsum([size for _, size in kinds]).tolist()
    groups = list(zip([0, *stops[:-1]], stops, strict=True))
    heads = [group for (kind, _), group in zip(kinds, groups, strict=True) if kind == "head"]
    codec: VectorCodec = way(groups, heads)
    return codec


def _representatives(takers: Sequence[Participant], server_round: int) -> list[Participant]:
    """Choose at most `MAX_CLIENTS`, evenly over those sorted by tier and rows."""
    by_size = sorted(takers, key=lambda taker: (taker.tier, taker.num_rows, taker.client))
    count = min(MAX_CLIENTS, len(takers))
    offset = server_round * 0.6180339887 % 1  # another place in each round
    chosen = (np.arange(count) + offset) * len(takers) / count
    return [by_size[int(index)] for index in chosen]
