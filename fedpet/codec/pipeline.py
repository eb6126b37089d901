"""Encode values into a payload by a codec's name, and decode them again.

In:  values, float32 (n,), finite; the codec's name; groups; a seed.
Out: bytes. The reader knows the codec, the groups and the seed, and with them n.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from fedpet.codec.dither import DITHER_GRIDS, decode_dither, encode_dither
from fedpet.codec.eden import decode_eden, encode_eden
from fedpet.codec.entropy import Reader, stored_bytes, varint
from fedpet.codec.floats import decode_bfloat16, decode_float32, encode_bfloat16, encode_float32
from fedpet.codec.index_coding import decode_positions, encode_positions, most_position_bytes
from fedpet.codec.integers import GRIDS, decode_integers, encode_integers
from fedpet.codec.spec import Codec, parse_codec
from fedpet.codec.topk import largest, num_kept
from fedpet.codec.vector_types import Floats, Groups
from fedpet.codec.windows import Windows
from fedpet.errors import FrameError, TrainingError

Seeds = tuple[int, int]  # the sender's own, and the rotation's


def encode_values(
    values: npt.NDArray[np.floating],
    codec: str,
    groups: Groups,
    *,
    seed: int,
    rotation_seed: int | None = None,
    rotated: bool = False,
) -> bytes:
    """Write values.

    Args:
        values: Finite, (n,). Taken as float32.
        codec: A codec's name.
        groups: (start, stop) of the parts that are scaled and rotated apart. They follow one
            another from 0 to n.
        seed: Of rounding, dither and rotation; non-negative. The decoder must have the same. A new
            one for each run, round and client, or their errors do not average out.
        rotation_seed: Of the rotation of "dither" codecs, which senders whose values are added may
            share; None is `seed`.
        rotated: They are rotated already, by a "dither" codec's rotation.

    Raises:
        ConfigError: There is no such codec.
        TrainingError: A value is NaN, or infinite.
    """
    parsed = parse_codec(codec)
    with np.errstate(over="ignore"):  # beyond float32 is infinite, and refused below
        values = np.ascontiguousarray(values, dtype=np.float32)
    count = _count(groups)
    if values.shape != (count,):
        raise ValueError(f"groups end at {count}, values are of shape {values.shape}.")
    if not np.isfinite(values).all():
        wrong = np.flatnonzero(~np.isfinite(values))
        raise TrainingError(
            f"values must be finite, got {values[wrong[0]]} at position {wrong[0]} and "
            f"{len(wrong)} of {count} in all: training diverged, lower the learning rate."
        )
    seeds = (seed, seed if rotation_seed is None else rotation_seed)
    return _encode(values, parsed, groups, seeds, rotated=rotated) if count else b""


def decode_values(
    payload: bytes | memoryview,
    codec: str,
    groups: Groups,
    *,
    seed: int,
    rotation_seed: int | None = None,
) -> Floats:
    """Read values.

    Args:
        payload: Bytes of `encode_values`, with the same codec, groups and seeds.

    Returns:
        float32 (n,), finite.

    Raises:
        FrameError: The payload is anything else.
    """
    parsed = parse_codec(codec)
    count = _count(groups)
    reader = Reader(payload)
    seeds = (seed, seed if rotation_seed is None else rotation_seed)
    values = np.empty(0, dtype=np.float32)
    if count:
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused below
            values = _decode(reader, parsed, groups, seeds)
    reader.end()
    if not np.isfinite(values).all():
        wrong = np.flatnonzero(~np.isfinite(values))
        raise FrameError(
            f"values must be finite, got {values[wrong[0]]} at position {wrong[0]} and "
            f"{len(wrong)} of {count} in all."
        )
    return values


def max_payload_bytes(codec: str, groups: Groups) -> int:
    """Return the longest payload of `encode_values`, to the byte where nothing can be compressed.

    Raises:
        ConfigError: There is no such codec.
    """
    parsed = parse_codec(codec)
    sizes = [stop - start for start, stop in groups if start < stop]
    if not sizes:
        return 0
    if not parsed.topk_ppm:
        return _most_bytes(parsed, sizes)
    kept = [num_kept(size, parsed.topk_ppm) for size in sizes]
    positions = sum(most_position_bytes(size) for size in sizes) + len(groups) - len(sizes)
    return len(varint(positions)) + positions + _most_bytes(parsed, kept)


def _most_bytes(codec: Codec, sizes: list[int]) -> int:
    count = sum(sizes)
    if codec.base in ("float32", "bfloat16"):
        return _words_bytes(count, codec.bits // 8)
    if codec.base in GRIDS:
        num_blocks = sum(-(-size // GRIDS[codec.base].block) for size in sizes)
        return _words_bytes(num_blocks, 2) + 1 + stored_bytes(count, GRIDS[codec.base].alphabet)
    stops = np.cumsum([0, *sizes]).tolist()
    windows = Windows(list(itertools.pairwise(stops)))
    floats = _words_bytes(windows.num_loose, 4) + _words_bytes(len(windows.starts), 4)
    turned = count - windows.num_loose
    if codec.is_dithered:
        return floats + 1 + (turned + 7) // 8 * DITHER_GRIDS[codec.bits].plane_bits
    return floats + 1 + stored_bytes(turned, 1 << codec.bits)


def _words_bytes(count: int, num_planes: int) -> int:
    """Return the bytes of floats in planes, not compressed: exponent, modes and values."""
    return 1 + num_planes * (1 + count) if count else 0


def _count(groups: Groups) -> int:
    end = 0
    for start, stop in groups:
        if start != end or stop < start:
            raise ValueError(
                f"groups must follow one another from 0, got ({start}, {stop}) behind {end}."
            )
        end = stop
    return end


def _encode(
    values: Floats, codec: Codec, groups: Groups, seeds: Seeds, *, rotated: bool = False
) -> bytes:
    entropy = codec.entropy
    if codec.topk_ppm:
        return _encode_largest(values, codec, groups, seeds)
    if codec.base == "float32":
        return encode_float32(values, entropy=entropy)
    if codec.base == "bfloat16":
        return encode_bfloat16(values, seeds[0], entropy=entropy)
    filled = [(start, stop) for start, stop in groups if start < stop]
    if codec.base in GRIDS:
        return encode_integers(values, GRIDS[codec.base], filled, seeds[0], entropy=entropy)
    if codec.is_dithered:
        return encode_dither(values, codec.bits, filled, *seeds, entropy=entropy, rotated=rotated)
    return encode_eden(values, codec.bits, filled, seeds[0], entropy=entropy)


def _decode(reader: Reader, codec: Codec, groups: Groups, seeds: Seeds) -> Floats:
    if codec.topk_ppm:
        return _decode_largest(reader, codec, groups, seeds)
    if codec.base == "float32":
        return decode_float32(reader, groups[-1][1])
    if codec.base == "bfloat16":
        return decode_bfloat16(reader, groups[-1][1])
    filled = [(start, stop) for start, stop in groups if start < stop]
    if codec.base in GRIDS:
        return decode_integers(reader, GRIDS[codec.base], filled)
    if codec.is_dithered:
        return decode_dither(reader, codec.bits, filled, *seeds)
    return decode_eden(reader, codec.bits, filled, seeds[0])


def _encode_largest(values: Floats, codec: Codec, groups: Groups, seeds: Seeds) -> bytes:
    chosen = [
        largest(values[start:stop], num_kept(stop - start, codec.topk_ppm))
        for start, stop in groups
    ]
    positions = encode_positions(chosen, [stop - start for start, stop in groups])
    kept = np.concatenate(
        [values[start:stop][where] for (start, stop), where in zip(groups, chosen, strict=True)]
    )
    inner, parts = replace(codec, topk_ppm=0), _side_by_side(chosen)
    payload = _encode(kept, inner, parts, seeds) if len(kept) else b""
    return varint(len(positions)) + positions + payload


def _decode_largest(reader: Reader, codec: Codec, groups: Groups, seeds: Seeds) -> Floats:
    sizes = [stop - start for start, stop in groups]
    chosen = decode_positions(reader.take(reader.varint()), sizes)
    for where, size in zip(chosen, sizes, strict=True):
        most = num_kept(size, codec.topk_ppm)
        if len(where) > most:
            raise FrameError(
                f"{codec.name} sends at most {most} of a group of {size} values, got {len(where)}."
            )
    inner, parts = replace(codec, topk_ppm=0), _side_by_side(chosen)
    values = np.zeros(groups[-1][1], dtype=np.float32)
    if parts[-1][1]:
        kept = _decode(reader, inner, parts, seeds)
        for (start, stop), where, part in zip(groups, chosen, parts, strict=True):
            values[start:stop][where] = kept[slice(*part)]
    return values


def _side_by_side(chosen: list[npt.NDArray[np.int64]]) -> list[tuple[int, int]]:
    stops = np.cumsum([len(where) for where in chosen]).tolist()
    return list(zip([0, *stops[:-1]], stops, strict=True))
