"""How long payloads are: made-up updates, encoded by the run's own codec.

    outline -> layout -> [updates] -> messages -> cost

In:  kinds and sizes of the values, the training settings, the codecs, and how many rows each of
     a round's clients holds.
Out: the mean payload of every round, up and down.

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
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedpet.codec import decode_values, encode_values, max_payload_bytes
from fedpet.codec.names import parse_codec
from fedpet.config import CodecConfig, TrainingConfig

__all__ = ["Payloads", "is_fixed", "local_steps", "payloads"]

Floats = npt.NDArray[np.float32]

# What is played through; beyond it, lengths are scaled (values) or interpolated (rounds).
MAX_VALUES = 1 << 16
MAX_ROUNDS = 20
MAX_CLIENTS = 10
MAX_STEPS = 16
LEAST_VALUES = 4096  # of a kind, where it has as many: a window of a rotation

# Standard deviation of a gradient's entries, by kind.
_GRADIENTS = {"lnfit": 1e-3, "ln-bias": 1e-3, "bitfit": 1e-3, "hiwi-bias": 1e-3, "head": 7e-3}
_OTHER_GRADIENTS = 2e-4
# How that deviation differs, in decades: from entry to entry, most where entries are of many rows
# or of one tensor's outputs, and from stretch to stretch of a kind.
_SPREADS = {"mask": 0.35, "lnfit": 0.35, "ln-bias": 0.35, "bitfit": 0.35, "hiwi-bias": 0.35}
_OTHER_SPREADS = 0.1
_STRETCH = 256  # entries
_STRETCH_SPREAD = 0.3
_STEP_SPREAD = 0.15  # decades, of a whole gradient's size from step to step
_SIGNAL = 0.15  # what steps and clients of a round share, against what they do not
_BETAS, _EPSILON = (0.9, 0.999), 1e-8  # torch's AdamW, as fedpet.training asks for it


@dataclass(frozen=True)
class Payloads:
    """Mean length of a payload, in bytes, by round from 1.

    Attributes:
        up: Of a client's update, float64 (rounds,).
        down: Of the server's values, float64 (rounds,).
    """

    up: npt.NDArray[np.float64]
    down: npt.NDArray[np.float64]


def is_fixed(codec: str) -> bool:
    """Whether a codec's payload has one length, whatever the values are."""
    parsed = parse_codec(codec)
    return not parsed.entropy and not parsed.top_ppm


def local_steps(num_rows: int, training: TrainingConfig) -> int:
    """Optimiser steps of a client that holds this many rows."""
    return training.local_epochs * math.ceil(num_rows / training.batch_size)


def payloads(
    kinds: Sequence[tuple[str, int]],
    training: TrainingConfig,
    codec: CodecConfig,
    rows: Sequence[Sequence[int]],
    *,
    seed: int = 0,
) -> Payloads:
    """Play a federation through on random gradients, and measure its payloads.

    Args:
        kinds: Kind and number of the values of each group that a codec scales apart, in order.
        training: Optimiser, learning rates, schedule, batch size, epochs.
        codec: Up and down.
        rows: For each round the rows that each of its clients holds.
        seed: Of the gradients.

    Raises:
        ConfigError: There is no such codec.
    """
    num_rounds = len(rows)
    whole = _groups([size for _, size in kinds])
    up = np.full(num_rounds, float(max_payload_bytes(codec.up, whole)))
    down = np.full(num_rounds, float(max_payload_bytes(codec.down, whole)))
    if is_fixed(codec.up) and is_fixed(codec.down):
        return Payloads(up, down)
    played = _played_rounds(num_rounds)
    federation = _Federation(kinds, training, codec, num_rounds, seed)
    sent, received = [], []
    for index, server_round in enumerate(played):
        following = played[index + 1] if index + 1 < len(played) else server_round + 1
        of_each, of_all = federation.play(
            server_round, rows[server_round - 1], following - server_round
        )
        sent.append(of_each)
        received.append(of_all)
    every = np.arange(1, num_rounds + 1)
    if not is_fixed(codec.up):
        up = np.interp(every, played, sent)
    if not is_fixed(codec.down):  # round 1 sends zeros, and is like no other
        down[0] = received[0]
        if num_rounds > 1:
            down[1:] = np.interp(every[1:], played[1:], received[1:])
    return Payloads(up, down)


class _Federation:
    """A few thousand values, moved as a run's are."""

    def __init__(
        self,
        kinds: Sequence[tuple[str, int]],
        training: TrainingConfig,
        codec: CodecConfig,
        num_rounds: int,
        seed: int,
    ) -> None:
        self._codec = codec
        self._training = training
        self._num_rounds = num_rounds
        self._random = np.random.default_rng(seed)
        sizes = _shrunk([size for _, size in kinds])
        self._groups = _groups(sizes)
        count = sum(sizes)
        self._scale = sum(size for _, size in kinds) / count
        self._rates = np.concatenate(
            [
                np.full(size, training.rate_of(kind), dtype=np.float32)
                for (kind, _), size in zip(kinds, sizes, strict=True)
            ]
        )
        self._deviations = np.concatenate(
            [self._spread(kind, size) for (kind, _), size in zip(kinds, sizes, strict=True)]
        )
        self._values = np.zeros(count, dtype=np.float32)  # (n',), the server's

    def play(self, server_round: int, rows: Sequence[int], num_rounds: int) -> tuple[float, float]:
        """One round, of some of its clients, the others being like them.

        Args:
            server_round: From 1.
            rows: That each of the round's clients holds.
            num_rounds: How many rounds it stands for.

        Returns:
            Length of a payload up, on average, and down; as of all values.
        """
        down, start = self._sent(self._values, self._codec.down, server_round)
        rates = self._rates
        if self._training.schedule == "linear":
            rates = rates * np.float32(1.0 - (server_round - 1) / self._num_rounds)
        signal = np.float32(_SIGNAL) * self._normal()
        lengths, updates = [], []
        for client, num_rows in enumerate(_representatives(rows, server_round)):
            steps = min(local_steps(num_rows, self._training), MAX_STEPS)
            update = self._client(start, rates, signal, steps)
            length, received = self._sent(update, self._codec.up, 1000 * server_round + client)
            lengths.append(length)
            updates.append(received)
        self._average(updates, len(rows), num_rounds)
        return float(np.mean(lengths)), down

    def _sent(self, values: Floats, codec: str, seed: int) -> tuple[float, Floats]:
        """Length of a payload, as of all values, and what is decoded from it."""
        payload = encode_values(values, codec, self._groups, seed=seed)
        return self._scale * len(payload), decode_values(payload, codec, self._groups, seed=seed)

    def _average(self, updates: list[Floats], num_clients: int, num_rounds: int) -> None:
        """Move the server's values by the mean, as `num_rounds` rounds of `num_clients` would."""
        mean = np.mean(updates, axis=0, dtype=np.float64)
        played = len(updates)
        if num_clients > played > 1:
            # What clients share stays, what they do not averages out further.
            single = float(np.mean(np.square(updates, dtype=np.float64)))
            squared = float(np.mean(np.square(mean)))
            shared = max((played * squared - single) / (played - 1), 0.0)
            wanted = shared + (single - shared) / num_clients
            mean *= math.sqrt(wanted / squared) if squared else 1.0
        mean *= math.sqrt(num_rounds)  # rounds hardly correlate: their moves add up as a walk
        self._values = (self._values + mean).astype(np.float32)

    def _client(self, start: Floats, rates: Floats, signal: Floats, steps: int) -> Floats:
        """One client's update: `steps` of the optimiser from `start`. float32 (n',)."""
        training = self._training
        values = start.copy()
        first = np.zeros_like(values)
        second = np.zeros_like(values)
        decay = np.float32(training.weight_decay)
        for step in range(1, steps + 1):
            loud = np.float32(10 ** (_STEP_SPREAD * self._random.standard_normal()))
            gradient = self._normal()
            gradient += signal
            gradient *= self._deviations * loud
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
        entry = _SPREADS.get(kind, _OTHER_SPREADS) * self._random.standard_normal(size)
        stretches = self._random.standard_normal(-(-size // _STRETCH))
        stretch = _STRETCH_SPREAD * np.repeat(stretches, _STRETCH)[:size]
        deviation = _GRADIENTS.get(kind, _OTHER_GRADIENTS) * 10 ** (entry + stretch)
        return deviation.astype(np.float32)

    def _normal(self) -> Floats:
        return self._random.standard_normal(len(self._values), dtype=np.float32)


def _representatives(rows: Sequence[int], server_round: int) -> list[int]:
    """At most `MAX_CLIENTS` of a round's clients, evenly over those sorted by their rows."""
    if len(rows) <= MAX_CLIENTS:
        return list(rows)
    offset = server_round * 0.6180339887 % 1  # another place in each round
    chosen = (np.arange(MAX_CLIENTS) + offset) * len(rows) / MAX_CLIENTS
    return [sorted(rows)[int(index)] for index in chosen]


def _played_rounds(num_rounds: int) -> list[int]:
    """Rounds that are played through: 1, 2, and the others evenly up to the last."""
    if num_rounds <= MAX_ROUNDS:
        return list(range(1, num_rounds + 1))
    later = np.linspace(2, num_rounds, MAX_ROUNDS - 1).round().astype(int)
    return [1, *(int(server_round) for server_round in later)]


def _shrunk(sizes: Sequence[int]) -> list[int]:
    share = min(1.0, MAX_VALUES / sum(sizes))
    return [
        max(min(size, LEAST_VALUES), round(share * size)) if share < 1 else size for size in sizes
    ]


def _groups(sizes: Sequence[int]) -> list[tuple[int, int]]:
    stops = np.cumsum(sizes).tolist()
    return list(zip([0, *stops[:-1]], stops, strict=True))
