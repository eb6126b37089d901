"""Follow the public reference: values that server and clients share, moved by coded changes.

In:  the reference of an earlier round, and the coded changes since; or the reference itself.
Out: the reference of this round, the same bits on every device.

    R_0 = 0, the checkpoint            D_t = decode(encode(G_t - R_{t-1}))    R_t = R_{t-1} + D_t

G_t are the server's own values, which nobody else has. Clients train from R_t and send their
updates, and the server adds the mean of those to its values: the codec's error of one round is part
of the next one's change, so the reference never drifts from the values. A change is small beside
the values, and so is its error: at equal bits this loses less than coding the values anew.

A device that holds the reference of round s receives the changes of s + 1 to t. All hold R_0. Where
the changes are longer than the reference itself, coded without loss, the device receives that
instead. Every path gives R_t to the bit (one addition in float32 a round, which IEEE 754 defines),
so no result depends on the references that devices hold (law 6), and a checksum of R_t that goes
along is checked on every device.

Source: Seide et al. 2014 and EF21 (Richtarik et al., NeurIPS 2021) for the error that feeds itself
back. Ours: a chain of changes or the whole, whichever is shorter.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from fedpet.codec import VectorCodec, decode_values, encode_values
from fedpet.errors import FrameError
from fedpet.protocol.codec_seeds import downlink_seed
from fedpet.protocol.frame import Frame

__all__ = [
    "FULL_CODEC",
    "Reference",
    "apply_changes",
    "decode_full",
    "encode_full",
]

FULL_CODEC = "float32"  # the codec by which a reference itself is sent


@dataclass(frozen=True)
class Reference:
    """The values that a round's clients train from.

    Attributes:
        server_round: The round; 0 is the checkpoint.
        values: float32, (n,); never written to.
    """

    server_round: int
    values: np.ndarray

    @classmethod
    def start(cls, count: int) -> Reference:
        """Return the reference before the first round."""
        return cls(0, np.zeros(count, dtype=np.float32))

    @property
    def checksum(self) -> int:
        """The CRC-32 of the values as little-endian floats."""
        return zlib.crc32(self.values.astype("<f4", copy=False).tobytes())

    def moved(self, change: np.ndarray) -> Reference:
        """Return the next round's reference. `change`: float32, (n,)."""
        return Reference(self.server_round + 1, self.values + change)


def encode_full(reference: Reference) -> bytes:
    """Encode a reference without loss."""
    groups = [(0, len(reference.values))]
    return encode_values(reference.values, FULL_CODEC, groups, seed=0)


def decode_full(frame: Frame, count: int) -> Reference:
    """Decode a reference that was sent whole.

    Raises:
        FrameError: The frame holds no vector of so many values.
    """
    if frame.codec != FULL_CODEC or frame.count != count:
        raise FrameError(
            f"a reference is sent as {count} values by {FULL_CODEC!r}, the frame holds "
            f"{frame.count} by {frame.codec!r}."
        )
    values = decode_values(frame.payload, FULL_CODEC, [(0, count)], seed=0)
    return Reference(frame.server_round, values)


def apply_changes(
    held: Iterable[Callable[[], Reference | None]],
    changes: Sequence[Frame],
    coding: VectorCodec,
    *,
    run_seed: int,
    checksum: int,
) -> Reference | None:
    """Move a stored reference by the changes since.

    Args:
        held: Functions that find references, in the order in which they are tried.
        changes: Of rounds that follow one another, the last is this one's.
        coding: Their codec.
        run_seed: The plan's.
        checksum: Of the reference that must come out.

    Returns:
        This round's reference; None where no stored one leads there.

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
                seed = downlink_seed(run_seed, frame.server_round)
                decoded[frame.server_round] = coding.decode(frame.payload, seed=seed)
            with np.errstate(over="ignore", invalid="ignore"):
                reference = reference.moved(decoded[frame.server_round])
        if not np.isfinite(reference.values).all():
            raise FrameError("the changes of the reference lead out of float32.")
        if reference.checksum == checksum:
            return reference
    return None
