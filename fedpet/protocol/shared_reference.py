"""The public reference: values that server and clients hold alike, moved by coded changes.

    ... -> codec -> plan -> [client, strategy] -> ledger -> report

In:  the reference of an earlier round, and the coded changes since; or the reference itself.
Out: the reference of this round, the same bits on every device.

    R_0 = 0, the checkpoint            D_t = decode(encode(G_t - R_{t-1}))    R_t = R_{t-1} + D_t

G_t are the server's own values, which nobody else has. Clients train from R_t and send what they
moved by, the server takes the mean of that for G: what the codec lost in one round is part of the
next one's change, so the reference never drifts from the values. A change is small beside the
values, and so is its error; that is what this costs less than coding the values anew each round.

Whoever holds the reference of round s is sent the changes of s + 1 to t. All hold R_0. Where that
is longer than the reference itself, coded without loss, it is sent that instead: by every path it
is R_t to the bit (one addition in float32 a round, which IEEE 754 settles), so no result depends
on who held what (law 6), and a checksum of R_t that goes along says so on every device.

Source: Seide et al. 2014 and EF21 (Richtarik et al., NeurIPS 2021) for the error that feeds itself
back; a chain or the whole, whichever is shorter, is ours.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from fedpet.codec import VectorCodec, decode_values, encode_values
from fedpet.errors import FrameError
from fedpet.protocol.frame import Frame
from fedpet.utils.seeds import derive_seed

__all__ = ["WHOLE", "Reference", "decode_whole", "encode_full", "follow", "seed_of_round"]

WHOLE = "float32"  # the codec by which a reference itself is sent


@dataclass(frozen=True)
class Reference:
    """What a round's clients train from.

    Attributes:
        server_round: The round; 0 is the checkpoint.
        values: float32, (n,); never written to.
    """

    server_round: int
    values: np.ndarray

    @classmethod
    def start(cls, count: int) -> Reference:
        """Everyone's, before the first round."""
        return cls(0, np.zeros(count, dtype=np.float32))

    @property
    def checksum(self) -> int:
        """CRC-32 of the values as little-endian floats."""
        return zlib.crc32(self.values.astype("<f4", copy=False).tobytes())

    def moved(self, change: np.ndarray) -> Reference:
        """The next round's. `change`: float32, (n,)."""
        return Reference(self.server_round + 1, self.values + change)


def seed_of_round(run_seed: int, server_round: int) -> int:
    """Of the codec of one round's downlink."""
    return derive_seed("downlink", run_seed, server_round)


def encode_full(reference: Reference) -> bytes:
    """A reference without loss."""
    groups = [(0, len(reference.values))]
    return encode_values(reference.values, WHOLE, groups, seed=0)


def decode_whole(frame: Frame, count: int) -> Reference:
    """A reference that came whole.

    Raises:
        FrameError: The frame holds no vector of so many values.
    """
    if frame.codec != WHOLE or frame.count != count:
        raise FrameError(
            f"a reference is sent as {count} values by {WHOLE!r}, the frame holds {frame.count} by "
            f"{frame.codec!r}."
        )
    values = decode_values(frame.payload, WHOLE, [(0, count)], seed=0)
    return Reference(frame.server_round, values)


def follow(
    held: Iterable[Callable[[], Reference | None]],
    changes: Sequence[Frame],
    coding: VectorCodec,
    *,
    run_seed: int,
    checksum: int,
) -> Reference | None:
    """Move a held reference by the changes that it has not seen.

    Args:
        held: Where references may be, in the order in which they are tried.
        changes: Of rounds that follow one another, the last is this one's.
        coding: How they are written.
        run_seed: The plan's.
        checksum: Of the reference that must come out.

    Returns:
        This round's reference; None where none that is held leads there.

    Raises:
        FrameError: A change does not decode, or leads out of float32.
    """
    first, last = changes[0].server_round, changes[-1].server_round
    decoded: dict[int, np.ndarray] = {}
    for find in held:
        reference = find()
        if reference is None or not first - 1 <= reference.server_round <= last:
            continue
        for frame in changes[reference.server_round - first + 1 :]:
            if frame.server_round not in decoded:
                seed = seed_of_round(run_seed, frame.server_round)
                decoded[frame.server_round] = coding.decode(frame.payload, seed=seed)
            with np.errstate(over="ignore", invalid="ignore"):
                reference = reference.moved(decoded[frame.server_round])
        if not np.isfinite(reference.values).all():
            raise FrameError("the changes of the reference lead out of float32.")
        if reference.checksum == checksum:
            return reference
    return None
