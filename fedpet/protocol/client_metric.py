"""Pack, read and check a client's own metric: on the rows that it does not train on.

The section, little-endian, 25 bytes, before a frame's payload:

    flags           1    1: there is a value before training, 2: there is one after
    rows            4    that were measured
    before, after   8    doubles; 0 where there is none
    seconds         4    a float32, of measuring

A value that is NaN or infinite, of a model that has diverged, is sent as none. What is read is a
stranger's word: each number is held against a bound here, and against what the plan asks for and
the client's rows by the server.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

from fedpet.errors import FrameError

__all__ = ["SECTION_BYTES", "ClientMetric", "pack_section", "read_section"]

_SECTION = struct.Struct("<BIddf")
SECTION_BYTES = _SECTION.size
MAX_SECONDS = 1e9
_BEFORE, _AFTER = 1, 2


@dataclass(frozen=True)
class ClientMetric:
    """The metric that decides, on one client's own rows.

    Attributes:
        num_rows: That were measured, at least one.
        before: Of the values that the client received; None where outputs were not finite.
        after: Of its own trained values; None where they were not finite, or not measured.
        seconds: That measuring took.
    """

    num_rows: int
    before: float | None
    after: float | None = None
    seconds: float = 0.0


def pack_section(found: ClientMetric) -> bytes:
    """Write a section."""
    before, after = (_finite(value) for value in (found.before, found.after))
    flags = _BEFORE * (before is not None) + _AFTER * (after is not None)
    seconds = min(max(found.seconds, 0.0), MAX_SECONDS)
    return _SECTION.pack(flags, found.num_rows, before or 0.0, after or 0.0, seconds)


def read_section(section: bytes | memoryview, client: int) -> ClientMetric:
    """Read a section.

    Raises:
        FrameError: A number in it is out of bounds.
    """
    flags, num_rows, before, after, seconds = _SECTION.unpack_from(section)
    name = f"the evaluation of client {client:016x}"
    if flags > (_BEFORE | _AFTER) or num_rows < 1:
        raise FrameError(f"{name} has flags up to 3 and at least one row, got {flags}, {num_rows}.")
    for flag, value in ((_BEFORE, before), (_AFTER, after)):
        if not math.isfinite(value) or (value and not flags & flag):
            raise FrameError(f"{name} has finite values where its flags name them, got {value!r}.")
    if not 0 <= seconds <= MAX_SECONDS:
        raise FrameError(f"{name} took 0 to {MAX_SECONDS:g} seconds, got {seconds!r}.")
    return ClientMetric(
        num_rows,
        before if flags & _BEFORE else None,
        after if flags & _AFTER else None,
        seconds,
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
