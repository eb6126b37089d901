"""How long payloads are: made-up updates, encoded by the run's own codec.

    outline -> layout -> draws -> rules -> [updates] -> downlink -> messages -> cost

In:  kinds and sizes of each tier's values, the run's plan, and the clients of each round.
Out: the mean payload of every round and tier: up, down, and of a whole reference.

A codec without an entropy stage writes as many bytes whatever the values are, and its own
arithmetic says how many. With one, the length hangs on the values' distribution: floats on the
spread of their exponents and on trailing zeros, quantised symbols on the tail. Neither a Gaussian
nor a Laplace vector has those of a trained one. A client's first step of AdamW moves every value
by the learning rate, nearly to the bit, which compresses to 60 % of what ten steps give; and a
change added to a value a hundred times its size keeps seven bits less. So the whole federation
is played through: the optimiser's arithmetic in float32, the schedule, the clients' steps, what
the codecs lose, and the average, with random gradients in the place of a model's.

Of a gradient three things count here, and are taken from measured runs of the default job
(MiniLM, film reviews, 20 rounds): its size against AdamW's epsilon, which decides only what a
single step looks like; how little its direction is shared by steps and clients (updates of one
round correlate by 0.1, of two rounds by 0.02); how sizes differ from entry to entry, which SGD
passes on to the update, and from step to step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fedpet.codec import VectorCodec, encode_with_feedback
from fedpet.codec.spec import parse_codec
from fedpet.config import StrategyConfig, TrainingConfig
from fedpet.estimate.participants import Participant
from fedpet.estimate.server_optimizer import ServerRule
from fedpet.pet.modules.registry import KINDS
from fedpet.protocol.plan import Plan
from fedpet.protocol.shared_reference import Reference, encode_full

__all__ = ["Kinds", "Payloads", "is_fixed", "local_steps", "payloads"]

Kinds = Sequence[tuple[str, int]]  # kind and number of the values of each group, in order
Floats = npt.NDArray[np.float32]

# What is played through; beyond it, lengths are scaled (values) or interpolated (rounds).
MAX_VALUES = 1 << 16
MAX_ROUNDS = 20
MAX_CLIENTS = 10
MAX_STEPS = 16
LEAST_VALUES = 4096  # of a kind, where it has as many: a window of a rotation

# Standard deviation of a gradient's entries, where no kind of module says its own.
_GRADIENTS = {"mask": 2e-4, "head": 7e-3}
# How that deviation differs, in decades: from entry to entry, most where entries are of many rows
# or of one tensor's outputs, and from stretch to stretch of a kind.
_SPREADS = {"mask": 0.35, "head": 0.1}
_STRETCH = 256  # entries
_STRETCH_SPREAD = 0.3
_STEP_SPREAD = 0.15  # decades, of a whole gradient's size from step to step
_SIGNAL = 0.15  # what steps and clients of a round share, against what they do not
_BETAS, _EPSILON = (0.9, 0.999), 1e-8  # torch's AdamW, as fedpet.training.optimizer makes it


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
    """Whether these codecs' payloads have one length, whatever the values are."""
    parsed = [parse_codec(codec) for codec in codecs if codec]
    return not any(codec.entropy or codec.topk_ppm for codec in parsed)


def local_steps(num_rows: int, training: TrainingConfig) -> int:
    """Optimiser steps of a client that holds this many rows."""
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
        plan: Codecs, what is kept from round to round, training settings.
        strategy: How the server moves.
        rounds: The clients of each.
        seed: Of the gradients.
    """
    codec = plan.codec
    up_is_fixed, down_is_fixed = (
        is_fixed(*names)
        for names in ((codec.uplink, codec.head_uplink), (codec.downlink, codec.head_downlink))
    )
    fixed = [_codings(plan, kinds) for kinds in tiers]
    shape = (len(rounds), len(tiers))
    up = np.full(shape, [pair.up.max_payload_bytes for pair in fixed], dtype=np.float64)
    down = np.full(shape, [pair.down.max_payload_bytes for pair in fixed], dtype=np.float64)
    whole = np.zeros(shape)
    if up_is_fixed and down_is_fixed and not plan.is_delta_downlink:
        return Payloads(up, down, whole)
    federation = _Federation(tiers, plan, ServerRule(strategy, plan.training), seed)
    played = _played_rounds(len(rounds))
    for index, server_round in enumerate(played):
        following = played[index + 1] if index + 1 < len(played) else server_round + 1
        federation.play(server_round, rounds[server_round - 1], following - server_round)
    every = np.arange(1, len(rounds) + 1)
    for tier, line in enumerate(federation.lines):
        if not up_is_fixed and line.sent:
            up[:, tier] = np.interp(every, list(line.sent), list(line.sent.values()))
        if not down_is_fixed:
            down[:, tier] = _from_round_2(line.received, every)
        if plan.is_delta_downlink:
            whole[:, tier] = _from_round_2(line.whole, every)
    return Payloads(up, down, whole)


@dataclass(frozen=True)
class _Codings:
    """How a tier's values are written, up and down."""

    up: VectorCodec
    down: VectorCodec


@dataclass
class _Line:
    """What one tier sends and receives.

    Attributes:
        where: Which of all values are the tier's, bool (n',).
        codings: Of those.
        scale: How many values stand for one of them.
        reference: From which the tier's clients train.
        sent, received, whole: Lengths by round, as of all values.
    """

    where: npt.NDArray[np.bool_]
    codings: _Codings
    scale: float
    reference: Reference
    sent: dict[int, float] = field(default_factory=dict)
    received: dict[int, float] = field(default_factory=dict)
    whole: dict[int, float] = field(default_factory=dict)


class _Federation:
    """A few thousand values, moved as a run's are."""

    def __init__(self, tiers: Sequence[Kinds], plan: Plan, rule: ServerRule, seed: int) -> None:
        self._plan = plan
        self._rule = rule
        self._random = np.random.default_rng(seed)
        largest = tiers[-1]
        kinds = [(kind, size) for (kind, _), size in zip(largest, _shrunk(largest), strict=True)]
        self._rates = np.concatenate(
            [np.full(size, plan.training.rate_of(kind), dtype=np.float32) for kind, size in kinds]
        )
        self._deviations = np.concatenate([self._spread(kind, size) for kind, size in kinds])
        self._values = np.zeros(len(self._rates), dtype=np.float32)  # (n',), the server's
        self._residuals: dict[int, Floats] = {}  # client -> what its last payload left
        self.lines = [self._line(tier, kinds, largest) for tier in tiers]

    def _line(self, tier: Kinds, kinds: Kinds, largest: Kinds) -> _Line:
        own = [
            (kind, max(1, round(size * of_tier / of_all)) if of_tier < of_all else size)
            for (kind, size), (_, of_tier), (_, of_all) in zip(kinds, tier, largest, strict=True)
        ]
        where = np.concatenate(
            [
                np.arange(size) < its  # as in a run, the front of a mask's ranking
                for (_, size), (_, its) in zip(kinds, own, strict=True)
            ]
        )
        count = int(where.sum())
        scale = sum(size for _, size in tier) / count
        return _Line(where, _codings(self._plan, own), scale, Reference.start(count))

    def play(self, server_round: int, takers: Sequence[Participant], num_rounds: int) -> None:
        """One round, of some of its clients, the others being like them.

        Args:
            server_round: From 1.
            takers: The round's clients.
            num_rounds: How many rounds it stands for.
        """
        for line in self.lines:
            self._send_down(line, server_round)
        training = self._plan.training
        rates = self._rates
        if training.schedule == "linear":
            rates = rates * np.float32(1.0 - self._plan.progress(server_round))
        signal = np.float32(_SIGNAL) * self._normal()
        updates: list[tuple[_Line, Floats]] = []
        lengths: dict[int, list[float]] = {}
        for taker in _representatives(takers, server_round):
            line = self.lines[taker.tier]
            steps = min(local_steps(taker.num_rows, training), MAX_STEPS)
            where, start = line.where, line.reference.values
            update = self._client(
                start, rates[where], signal[where], self._deviations[where], steps
            )
            length, update = self._send_up(line, taker.client, update, server_round)
            lengths.setdefault(taker.tier, []).append(length)
            updates.append((line, update))
        for tier, each in lengths.items():
            self.lines[tier].sent[server_round] = float(np.mean(each))
        self._average(updates, len(takers), server_round, num_rounds)

    def _send_down(self, line: _Line, server_round: int) -> None:
        """Bring a tier's clients the values, or its reference nearer to them."""
        coding, values = line.codings.down, self._values[line.where]
        changes = self._plan.is_delta_downlink
        start = line.reference.values if changes else np.zeros_like(values)
        payload = coding.encode(values - start, seed=server_round)
        decoded = coding.decode(payload, seed=server_round)
        line.reference = Reference(server_round, start + decoded if changes else decoded)
        line.received[server_round] = line.scale * len(payload)
        if changes:
            line.whole[server_round] = line.scale * len(encode_full(line.reference))

    def _send_up(
        self, line: _Line, client: int, update: Floats, server_round: int
    ) -> tuple[float, Floats]:
        """Length of a client's payload, and what the server decodes from it."""
        seed = self._plan.seed + client + server_round
        coding = line.codings.up
        if self._plan.codec.error_feedback:
            residual = self._residuals.get(client)
            payload, self._residuals[client] = encode_with_feedback(
                update, residual, coding, seed=seed
            )
        else:
            payload = coding.encode(update, seed=seed)
        return line.scale * len(payload), coding.decode(payload, seed=seed)

    def _average(
        self,
        updates: list[tuple[_Line, Floats]],
        num_replies: int,
        server_round: int,
        num_rounds: int,
    ) -> None:
        """Move the server's values, as `num_rounds` rounds of `num_replies` would."""
        total = np.zeros(len(self._values), dtype=np.float64)
        squares, weight = total.copy(), total.copy()
        for line, update in updates:
            total[line.where] += update
            squares[line.where] += np.square(update, dtype=np.float64)
            weight[line.where] += 1
        np.maximum(weight, 1, out=weight)
        mean, played = total / weight, len(updates)
        averaged = self._rule.num_averaged(num_replies)
        if averaged != played > 1:
            # What clients share stays; what they do not averages out, further the more there are.
            single, squared = float(np.mean(squares / weight)), float(np.mean(np.square(mean)))
            shared = max((played * squared - single) / (played - 1), 0.0)
            wanted = shared + (single - shared) / averaged
            mean *= math.sqrt(wanted / squared) if squared else 1.0
        move = mean.astype(np.float32)
        if self._rule.is_mean:  # rounds hardly correlate: their moves add up as a walk
            move, num_rounds = move * np.float32(math.sqrt(num_rounds)), 1
        for passed in range(num_rounds):
            signs = (
                self._random.choice(np.array([-1, 1], dtype=np.float32), len(move))
                if passed
                else np.float32(1)
            )
            self._values = self._rule.move(self._values, move * signs, server_round + passed)

    def _client(
        self, start: Floats, rates: Floats, signal: Floats, deviations: Floats, steps: int
    ) -> Floats:
        """One client's update: `steps` of the optimiser from `start`. float32, as `start`."""
        training = self._plan.training
        values = start.copy()
        first = np.zeros_like(values)
        second = np.zeros_like(values)
        decay = np.float32(training.weight_decay)
        for step in range(1, steps + 1):
            loud = np.float32(10 ** (_STEP_SPREAD * self._random.standard_normal()))
            gradient = self._normal(len(start))
            gradient += signal
            gradient *= deviations * loud
            if training.optimizer == "sgd":
                values -= rates * (gradient + decay * values)
                continue
            values *= 1 - rates * decay
            first += np.float32(1 - _BETAS[0]) * (gradient - first)
            second *= np.float32(_BETAS[1])
            second += np.float32(1 - _BETAS[1]) * gradient * gradient
            root = np.sqrt(second) / np.float32(math.sqrt(1 - _BETAS[1] ** step))
            root += np.float32(_EPSILON)
            values -= rates / np.float32(1 - _BETAS[0] ** step) * first / root
        return values - start

    def _spread(self, kind: str, size: int) -> Floats:
        """Standard deviations of one kind's gradient, float32 (size,)."""
        facts = KINDS.get(kind)
        gradient, spread = (
            (facts.gradient, facts.spread) if facts else (_GRADIENTS[kind], _SPREADS[kind])
        )
        entry = spread * self._random.standard_normal(size)
        stretches = self._random.standard_normal(-(-size // _STRETCH))
        stretch = _STRETCH_SPREAD * np.repeat(stretches, _STRETCH)[:size]
        deviation = gradient * 10 ** (entry + stretch)
        return deviation.astype(np.float32)

    def _normal(self, count: int | None = None) -> Floats:
        count = len(self._values) if count is None else count
        return self._random.standard_normal(count, dtype=np.float32)


def _codings(plan: Plan, kinds: Kinds) -> _Codings:
    stops = np.cumsum([size for _, size in kinds]).tolist()
    groups = list(zip([0, *stops[:-1]], stops, strict=True))
    heads = [group for (kind, _), group in zip(kinds, groups, strict=True) if kind == "head"]
    return _Codings(plan.uplink(groups, heads), plan.downlink(groups, heads))


def _from_round_2(
    lengths: Mapping[int, float], every: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Lengths of every round; the first sends zeros, and is like no other."""
    rounds, measured = list(lengths), list(lengths.values())
    if len(every) == 1:
        return np.array(measured)
    return np.append(measured[0], np.interp(every[1:], rounds[1:], measured[1:]))


def _representatives(takers: Sequence[Participant], server_round: int) -> list[Participant]:
    """At most `MAX_CLIENTS` of a round's clients, evenly over those sorted by tier and rows."""
    if len(takers) <= MAX_CLIENTS:
        return list(takers)
    offset = server_round * 0.6180339887 % 1  # another place in each round
    chosen = (np.arange(MAX_CLIENTS) + offset) * len(takers) / MAX_CLIENTS
    by_size = sorted(takers, key=lambda taker: (taker.tier, taker.num_rows, taker.client))
    return [by_size[int(index)] for index in chosen]


def _played_rounds(num_rounds: int) -> list[int]:
    """Rounds that are played through: 1, 2, and the others evenly up to the last."""
    if num_rounds <= MAX_ROUNDS:
        return list(range(1, num_rounds + 1))
    later = np.linspace(2, num_rounds, MAX_ROUNDS - 1).round().astype(int)
    return [1, *(int(server_round) for server_round in later)]


def _shrunk(kinds: Kinds) -> list[int]:
    """How many values of each group are played through."""
    sizes = [size for _, size in kinds]
    share = MAX_VALUES / sum(sizes)
    if share >= 1:
        return sizes
    return [max(min(size, LEAST_VALUES), round(share * size)) for size in sizes]
