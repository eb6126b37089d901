"""Encode a model's vector: by one codec, or by one for the head and one for the rest.

In:  values, float32 (n,); the codecs' names; the groups, and which of them are the head's.
Out: one payload, and the values again, or a `FrameError`.

    payload := values                                       where one codec writes all of them
             | bytes of the rest (varint) | rest | head     where the head has a codec of its own

A head is new, small beside a mask, and its deltas are the largest of all: an error in it touches
every class. So it may be worth more bits than the rest. A frame names the codec of the rest; that
of the head is in the plan, whose digest the frame carries.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from fedpet.codec.entropy import Reader, varint
from fedpet.codec.pipeline import decode_values, encode_values, max_payload_bytes
from fedpet.codec.spec import parse_codec
from fedpet.codec.vector_sum import VectorSum
from fedpet.codec.vector_types import Floats, Groups, Seeds
from fedpet.codec.windows import LARGEST
from fedpet.utils.seeds import derive_seed

__all__ = ["VectorCodec"]


@dataclass(frozen=True)
class VectorCodec:
    """Encode and decode one vector.

    Attributes:
        codec: Of the values, but for the head's where `head_codec` is another.
        groups: (start, stop) of the parts that are scaled and rotated apart, from 0 to n.
        head_groups: The head's groups among them.
        head_codec: Of the head's values; "" is as `codec`.
    """

    codec: str
    groups: tuple[tuple[int, int], ...]
    head_groups: tuple[tuple[int, int], ...] = ()
    head_codec: str = ""

    @classmethod
    def of(
        cls, groups: Groups, head_groups: Groups = (), *, codec: str, head_codec: str = ""
    ) -> VectorCodec:
        """Make one from lists of groups."""
        return cls(codec, tuple(groups), tuple(head_groups), head_codec)

    @property
    def count(self) -> int:
        """Number of values."""
        return self.groups[-1][1] if self.groups else 0

    @property
    def max_payload_bytes(self) -> int:
        """The longest payload that `encode` can write."""
        sizes = [max_payload_bytes(part.codec, part.groups) for part in self.parts]
        return sum(sizes) + (len(varint(sizes[0])) if len(sizes) > 1 else 0)

    def encode(
        self,
        values: npt.NDArray[np.floating],
        *,
        seed: int,
        rotation_seed: int | None = None,
        rotated: bool = False,
    ) -> bytes:
        """Write values, see `fedpet.codec.encode_values`.

        Args:
            values: Finite, (n,).
            seed: Of rounding, dither and rotation; a new one for each run, round and client.
            rotation_seed: Of the rotation that all senders of a round share; None is `seed`.
            rotated: They come from `rotate_updates` (fedpet/codec/torch_rotation.py).
        """
        if values.shape != (self.count,):
            raise ValueError(f"groups end at {self.count}, values are of shape {values.shape}.")
        payloads = [
            encode_values(
                values[part.where],
                part.codec,
                part.groups,
                **part.seeds(seed, rotation_seed),
                rotated=rotated and part.is_rotated_alike,
            )
            for part in self.parts
        ]
        if len(payloads) == 1:
            return payloads[0]
        return b"".join((varint(len(payloads[0])), *payloads))

    def decode(
        self, payload: bytes | memoryview, *, seed: int, rotation_seed: int | None = None
    ) -> Floats:
        """Read values, see `fedpet.codec.decode_values`.

        Returns:
            float32 (n,), finite.

        Raises:
            FrameError: The payload is anything but what `encode` writes.
        """
        decoded = [
            decode_values(own, part.codec, part.groups, **part.seeds(seed, rotation_seed))
            for part, own in zip(self.parts, self.split(payload), strict=True)
        ]
        if len(decoded) == 1:
            return decoded[0]
        values = np.empty(self.count, dtype=np.float32)
        for part, own in zip(self.parts, decoded, strict=True):
            values[part.where] = own
        return values

    def split(self, payload: bytes | memoryview) -> list[bytes | memoryview]:
        """Return the payload of each part, not decoded.

        Raises:
            FrameError: It is cut short.
        """
        if len(self.parts) == 1:
            return [payload]
        reader = Reader(payload)
        return [reader.take(reader.varint()), reader.rest()]

    def accumulator(self, rotation_seed: int, *, largest: float = LARGEST) -> VectorSum:
        """Return an empty sum of vectors whose senders share a rotation."""
        return VectorSum(self, rotation_seed, largest=largest)

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """Values by codec: all of them, or those of the rest and of the head."""
        if not self.head_groups or self.head_codec in ("", self.codec):
            return (Part(self.codec, list(self.groups), slice(None)),)
        rest = tuple(group for group in self.groups if group not in self.head_groups)
        return (_part(self.codec, rest), _part(self.head_codec, self.head_groups, "head"))


@dataclass(frozen=True)
class Part:
    """The values of one codec: their places, and their groups once they lie side by side."""

    codec: str
    groups: list[tuple[int, int]]
    where: npt.NDArray[np.int64] | slice
    name: str = ""

    @property
    def is_rotated_alike(self) -> bool:
        """Tell whether all senders rotate the same values: with top-k each chooses its own."""
        parsed = parse_codec(self.codec)
        return parsed.is_dithered and not parsed.topk_ppm

    def seeds(self, seed: int, rotation_seed: int | None) -> Seeds:
        """Return the part's own seeds; the first part's are those of a vector of one part."""
        rotation_seed = seed if rotation_seed is None else rotation_seed
        if self.name:
            seed, rotation_seed = (derive_seed(self.name, one) for one in (seed, rotation_seed))
        return {"seed": seed, "rotation_seed": rotation_seed}


@lru_cache
def _part(codec: str, groups: tuple[tuple[int, int], ...], name: str = "") -> Part:
    pieces = [np.arange(start, stop, dtype=np.int64) for start, stop in groups]
    stops = np.cumsum([0, *map(len, pieces)]).tolist()
    where = np.concatenate([np.empty(0, dtype=np.int64), *pieces])
    return Part(codec, list(itertools.pairwise(stops)), where, name)
