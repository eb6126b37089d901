"""Measure payloads on made-up updates, encoded by the run's own codec.

A codec without an entropy stage writes as many bytes whatever the values are. With one, the length
depends on the values' distribution: of floats on exponents and trailing zeros, of quantised symbols
on the tails. A client's first step of AdamW moves every value by the learning rate, nearly to the
bit, and compresses to 60 % of ten steps; a change added to a value a hundred times its size keeps
seven bits less. So the federation is played through on random gradients: the run's own optimiser
and codecs, Flower's own rule on the server, a share of the values, rounds and clients.

Measured on runs of the default job (MiniLM, film reviews, 20 rounds): the size of a gradient
against AdamW's epsilon; how little its direction is shared by steps and clients (updates of one
round correlate by 0.1, of two rounds by 0.02); how sizes differ between entries and steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import ConfigRecord

from fedpet.codec import VectorCodec, encode_with_feedback
from fedpet.codec.spec import parse_codec
from fedpet.config import StrategyConfig, TrainingConfig
from fedpet.estimate.participants import Participant
from fedpet.pet.modules.registry import KINDS
from fedpet.protocol.flower_compat import quiet_flower
from fedpet.protocol.plan import Plan
from fedpet.protocol.shared_reference import Reference, encode_full
from fedpet.server.aggregation import aggregate, to_arrays, train_message
from fedpet.server.rounds import make_rule
from fedpet.training.optimizer import make_optimizer, rate_factor

__all__ = ["Kinds", "Payloads", "is_fixed", "local_steps", "payloads"]

Kinds = Sequence[tuple[str, int]]  # kind and number of the values of each group, in order
Floats = npt.NDArray[np.float32]

# The part that is played through; beyond it, lengths are scaled (values) or interpolated (rounds).
MAX_VALUES = 1 << 16
MAX_ROUNDS = 12
MAX_CLIENTS = 8
MAX_STEPS = 16
MAX_MOVES = 50  # of a server with momentum, between two rounds that are played through
LEAST_VALUES = 4096  # of a kind, where it has as many: a window of a rotation

# Standard deviation of a gradient's entries, and its spread between them in decades, of what is no
# module (see `ModuleKind`); spread between stretches of a kind, and between steps.
_GRADIENTS = {"mask": (2e-4, 0.35), "head": (7e-3, 0.1)}
_STRETCH, _STRETCH_SPREAD = 256, 0.3
_STEP_SPREAD = 0.15
_SIGNAL = 0.15  # shared by steps and clients of a round, relative to the rest
_CORRELATION = 0.1  # of the updates of one round


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
    codec = plan.codec
    up_is_fixed = is_fixed(codec.uplink, codec.head_uplink)
    down_is_fixed = is_fixed(codec.downlink, codec.head_downlink) and not plan.is_delta_downlink
    shape = (len(rounds), len(tiers))
    lengths = Payloads(np.empty(shape), np.empty(shape), np.zeros(shape))
    for index, kinds in enumerate(tiers):
        lengths.up[:, index] = _codec(plan.uplink, kinds).max_payload_bytes
        lengths.down[:, index] = _codec(plan.downlink, kinds).max_payload_bytes
    if up_is_fixed and down_is_fixed:
        return lengths
    federation = _Federation(tiers, plan, strategy, seed)
    played = _played_rounds(len(rounds))
    for index, server_round in enumerate(played):
        following = played[index + 1] if index + 1 < len(played) else server_round + 1
        federation.play(server_round, rounds[server_round - 1], following - server_round)
    every = np.arange(1, len(rounds) + 1)
    for index, tier in enumerate(federation.tiers):
        if not up_is_fixed and tier.up_lengths:
            sent = tier.up_lengths
            lengths.up[:, index] = np.interp(every, list(sent), list(sent.values()))
        if not is_fixed(codec.downlink, codec.head_downlink):
            lengths.down[:, index] = _from_round_2(tier.down_lengths, every)
        if plan.is_delta_downlink:
            lengths.whole[:, index] = _from_round_2(tier.whole_lengths, every)
    return lengths


class Server:
    """Apply a strategy's rule, as Flower has it, to a vector."""

    def __init__(self, config: StrategyConfig, training: TrainingConfig) -> None:
        self._config, self._rule = config, make_rule(config, training)

    @property
    def is_mean(self) -> bool:
        """Tell whether the values move by the mean update."""
        return not self._config.has_server_optimizer

    def num_averaged(self, num_replies: int) -> int:
        """Return of how many updates the rule takes the mean, or something as quiet."""
        return min(max(self._config.num_averaged(num_replies), 1), num_replies)

    def move(self, values: Floats, mean: Floats, server_round: int) -> Floats:
        """Return the values after a round, float32 (n,)."""
        if self.is_mean:
            return values + mean
        reply = train_message(values + mean, num_examples=1, loss=0.0)
        with quiet_flower():
            self._rule.configure_train(server_round, to_arrays(values), ConfigRecord(), None)  # type: ignore[arg-type]  # no grid: nobody is sampled
            return aggregate(self._rule, server_round, values, [reply])[0]


class _Tier:
    """Hold the values of one tier, and the lengths of its payloads.

    Attributes:
        where: Which values are the tier's, bool (n,).
        up, down: Their codecs.
        scale: How many values stand for one of them.
        up_lengths, down_lengths, whole_lengths: By round, as of all values.
    """

    def __init__(self, plan: Plan, tier: Kinds, largest: Kinds, played: Kinds) -> None:
        own = [
            (kind, max(1, round(size * its / of_all)))
            for (kind, size), (_, its), (_, of_all) in zip(played, tier, largest, strict=True)
        ]
        pairs = zip(played, own, strict=True)  # as in a run, the front of a mask's ranking
        self.where = np.concatenate([np.arange(size) < its for (_, size), (_, its) in pairs])
        self.up, self.down = _codec(plan.uplink, own), _codec(plan.downlink, own)
        self.scale = sum(size for _, size in tier) / int(self.where.sum())
        self.up_lengths: dict[int, float] = {}
        self.down_lengths: dict[int, float] = {}
        self.whole_lengths: dict[int, float] = {}


class _Federation:
    """Move a few thousand values as a run does."""

    def __init__(
        self, tiers: Sequence[Kinds], plan: Plan, strategy: StrategyConfig, seed: int
    ) -> None:
        self._plan, self._server = plan, Server(strategy, plan.training)
        self._random = np.random.default_rng(seed)
        largest = tiers[-1]
        self._kinds = [(k, size) for (k, _), size in zip(largest, _shrunk(largest), strict=True)]
        self._deviations = np.concatenate([self._spread(kind, size) for kind, size in self._kinds])
        self._values = np.zeros(len(self._deviations), dtype=np.float32)  # the server's
        self._reference = self._values  # from which clients train
        self._residuals: dict[int, Floats] = {}  # client -> left by its last payload
        self.tiers = [_Tier(plan, tier, largest, self._kinds) for tier in tiers]

    def play(self, server_round: int, takers: Sequence[Participant], num_rounds: int) -> None:
        """Play one round, with some of its clients for all.

        Args:
            server_round: From 1.
            takers: The round's clients.
            num_rounds: How many rounds it stands for.
        """
        self._send_down(server_round)
        signal = np.float32(_SIGNAL) * self._normal()
        total, weight = (np.zeros(len(self._values)) for _ in range(2))
        lengths: dict[int, list[int]] = {}
        chosen = _representatives(takers, server_round)
        for taker in chosen:
            tier = self.tiers[taker.tier]
            update = self._client(taker, signal, server_round)[tier.where]
            seed = self._plan.seed + taker.client + server_round
            if self._plan.codec.error_feedback:
                residual = self._residuals.get(taker.client)
                payload, residual = encode_with_feedback(update, residual, tier.up, seed=seed)
                self._residuals[taker.client] = residual
            else:
                payload = tier.up.encode(update, seed=seed)
            total[tier.where] += tier.up.decode(payload, seed=seed)
            weight[tier.where] += 1
            lengths.setdefault(taker.tier, []).append(len(payload))
        for index, each in lengths.items():
            tier = self.tiers[index]
            tier.up_lengths[server_round] = tier.scale * float(np.mean(each))
        # What clients share stays; what they do not averages out, further the more there are.
        averaged = self._server.num_averaged(len(takers))
        squared = [_CORRELATION + (1 - _CORRELATION) / n for n in (averaged, len(chosen))]
        mean = total / np.maximum(weight, 1) * math.sqrt(squared[0] / squared[1])
        self._move(mean.astype(np.float32), server_round, num_rounds)

    def _send_down(self, server_round: int) -> None:
        changes = self._plan.is_delta_downlink
        start = self._reference if changes else np.zeros_like(self._values)
        for tier in self.tiers:  # the last one holds all values
            payload = tier.down.encode((self._values - start)[tier.where], seed=server_round)
            tier.down_lengths[server_round] = tier.scale * len(payload)
        self._reference = start + self.tiers[-1].down.decode(payload, seed=server_round)
        for tier in self.tiers if changes else ():
            whole = encode_full(Reference(server_round, self._reference[tier.where]))
            tier.whole_lengths[server_round] = tier.scale * len(whole)

    def _client(self, taker: Participant, signal: Floats, server_round: int) -> Floats:
        """Return one client's update, by the run's own optimiser."""
        training = self._plan.training
        values = torch.from_numpy(self._reference.copy())
        parts = values.split([size for _, size in self._kinds])
        groups: dict[str, list[Any]] = {}
        for (kind, _), part in zip(self._kinds, parts, strict=True):
            groups.setdefault(kind, []).append(part)
        factor = rate_factor(training.schedule, self._plan.progress(server_round))
        optimiser = make_optimizer(
            groups,
            lambda kind: training.rate_of(kind) * factor,
            name=training.optimizer,
            weight_decay=training.weight_decay,
        )
        for _ in range(min(local_steps(taker.num_rows, training), MAX_STEPS)):
            loud = np.float32(10 ** (_STEP_SPREAD * self._random.standard_normal()))
            gradient = torch.from_numpy((self._normal() + signal) * (self._deviations * loud))
            for part, its in zip(parts, gradient.split([len(p) for p in parts]), strict=True):
                part.grad = its
            optimiser.step()
        return values.numpy() - self._reference

    def _move(self, mean: Floats, server_round: int, num_rounds: int) -> None:
        """Move the server's values as `num_rounds` rounds would: they hardly correlate."""
        moves = 1 if self._server.is_mean else min(num_rounds, MAX_MOVES)
        more = np.float32(math.sqrt(num_rounds / moves))
        for index in range(moves):
            moved = self._server.move(self._values, mean, server_round + index)
            self._values = self._values + more * (moved - self._values)
            mean = mean * self._random.choice(np.array([-1, 1], dtype=np.float32), len(mean))

    def _spread(self, kind: str, size: int) -> Floats:
        """Return standard deviations of one kind's gradient, float32 (size,)."""
        facts = KINDS.get(kind)
        gradient, spread = (facts.gradient, facts.spread) if facts else _GRADIENTS[kind]
        entry = spread * self._random.standard_normal(size)
        stretches = self._random.standard_normal(-(-size // _STRETCH))
        stretch = _STRETCH_SPREAD * np.repeat(stretches, _STRETCH)[:size]
        return np.asarray(gradient * 10 ** (entry + stretch), dtype=np.float32)

    def _normal(self) -> Floats:
        return self._random.standard_normal(len(self._values), dtype=np.float32)


def _codec(way: Any, kinds: Kinds) -> VectorCodec:
    """Return `Plan.uplink` or `Plan.downlink` of these groups."""
    stops = np.cumsum([size for _, size in kinds]).tolist()
    groups = list(zip([0, *stops[:-1]], stops, strict=True))
    heads = [group for (kind, _), group in zip(kinds, groups, strict=True) if kind == "head"]
    codec: VectorCodec = way(groups, heads)
    return codec


def _from_round_2(
    lengths: Mapping[int, float], every: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Return lengths of every round; the first sends zeros, and is like no other."""
    rounds, measured = list(lengths), list(lengths.values())
    if len(every) == 1:
        return np.array(measured)
    return np.append(measured[0], np.interp(every[1:], rounds[1:], measured[1:]))


def _representatives(takers: Sequence[Participant], server_round: int) -> list[Participant]:
    """Choose at most `MAX_CLIENTS`, evenly over those sorted by tier and rows."""
    if len(takers) <= MAX_CLIENTS:
        return list(takers)
    offset = server_round * 0.6180339887 % 1  # another place in each round
    chosen = (np.arange(MAX_CLIENTS) + offset) * len(takers) / MAX_CLIENTS
    by_size = sorted(takers, key=lambda taker: (taker.tier, taker.num_rows, taker.client))
    return [by_size[int(index)] for index in chosen]


def _played_rounds(num_rounds: int) -> list[int]:
    """Choose the rounds to play through: 1, 2, and the others evenly up to the last."""
    if num_rounds <= MAX_ROUNDS:
        return list(range(1, num_rounds + 1))
    later = np.linspace(2, num_rounds, MAX_ROUNDS - 1).round().astype(int)
    return [1, *(int(server_round) for server_round in later)]


def _shrunk(kinds: Kinds) -> list[int]:
    """Return how many values of each group are played through."""
    sizes = [size for _, size in kinds]
    share = MAX_VALUES / sum(sizes)
    if share >= 1:
        return sizes
    return [max(min(size, LEAST_VALUES), round(share * size)) for size in sizes]
