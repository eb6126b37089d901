"""Values to a payload and back, under the codec that a name asks for.

    backbone -> mask -> structure -> search -> model -> [codec]
             -> plan -> client -> strategy -> ledger -> report

In:  values, float32 (n,), finite; the codec's name; groups; a seed.
Out: bytes. The reader knows the codec, the groups and the seed, and with them n.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedpet.codec.floats import decode_bfloat16, decode_float32, encode_bfloat16, encode_float32
from fedpet.codec.names import Codec, parse_codec
from fedpet.codec.wire import Reader
from fedpet.errors import FrameError, TrainingError

Floats = npt.NDArray[np.float32]
Groups = Sequence[tuple[int, int]]


def encode_values(
    values: npt.NDArray[np.floating], codec: str, groups: Groups, *, seed: int
) -> bytes:
    """Write values.

    Args:
        values: Finite, (n,). Taken as float32.
        codec: A codec's name.
        groups: (start, stop) of the parts that are scaled and rotated apart. They follow one
            another from 0 to n.
        seed: Of rounding and rotation; non-negative. Who decodes must have the same. A new one for
            each run, round and client, or their errors do not average out.

    Raises:
        ConfigError: There is no such codec.
        TrainingError: A value is NaN, or infinite.
    """
    parsed = parse_codec(codec)
    values = np.ascontiguousarray(values, dtype=np.float32)
    count = _count(groups)
    if values.shape != (count,):
        raise ValueError(f"groups end at {count}, values are of shape {values.shape}.")
    wrong = np.flatnonzero(~np.isfinite(values))
    if len(wrong):
        raise TrainingError(
            f"values must be finite, got {values[wrong[0]]} at position {wrong[0]} and "
            f"{len(wrong)} of {count} in all: training diverged, lower the learning rate."
        )
    return _encode(values, parsed, groups, seed) if count else b""


def decode_values(payload: bytes | memoryview, codec: str, groups: Groups, *, seed: int) -> Floats:
    """Read values.

    Args:
        payload: What `encode_values` wrote, with the same codec, groups and seed.

    Returns:
        float32 (n,), finite.

    Raises:
        FrameError: The payload is anything else.
    """
    parsed = parse_codec(codec)
    count = _count(groups)
    reader = Reader(payload)
    values = _decode(reader, parsed, groups, seed) if count else np.empty(0, dtype=np.float32)
    reader.end()
    if not np.isfinite(values).all():
        wrong = np.flatnonzero(~np.isfinite(values))
        raise FrameError(
            f"values must be finite, got {values[wrong[0]]} at position {wrong[0]} and "
            f"{len(wrong)} of {count} in all."
        )
    return values


def _count(groups: Groups) -> int:
    end = 0
    for start, stop in groups:
        if start != end or stop < start:
            raise ValueError(
                f"groups must follow one another from 0, got ({start}, {stop}) behind {end}."
            )
        end = stop
    return end


def _encode(values: Floats, codec: Codec, groups: Groups, seed: int) -> bytes:
    if codec.base == "float32":
        return encode_float32(values, entropy=codec.entropy)
    if codec.base == "bfloat16":
        return encode_bfloat16(values, seed, entropy=codec.entropy)
    raise NotImplementedError(codec.name)


def _decode(reader: Reader, codec: Codec, groups: Groups, seed: int) -> Floats:
    if codec.base == "float32":
        return decode_float32(reader, groups[-1][1])
    if codec.base == "bfloat16":
        return decode_bfloat16(reader, groups[-1][1])
    raise NotImplementedError(codec.name)
