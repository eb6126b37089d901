"""Who lives on a node: what it answers before its first training, read without trust.

    ... -> plan -> [client] -> strategy -> ledger -> report

In:  a node's clients and how many rows each holds.
Out: bytes, and back.

    roster := magic "FPRS" | version u8 | 3 reserved | clients u32
              | rows u32, name bytes u16, name (UTF-8) ...    (little-endian)

The server asks with a request that names no client and carries no values, only the plan; see
fedpet/protocol/request.py. Names and counts are all that it learns of the rows. A node that cannot
take
part answers with a refusal in the roster's place, and its reason is what the caller is told.
"""

from __future__ import annotations

import struct
import unicodedata
from collections.abc import Mapping

from fedpet.errors import FrameError, ReplyError
from fedpet.protocol.frame import Refusal, unpack_frames

MAX_CLIENTS = 100_000
MAX_NAME_BYTES = 256

_HEADER = struct.Struct("<4sB3xI")
_ENTRY = struct.Struct("<IH")
_MAGIC = b"FPRS"
_VERSION = 1


def encode_registration(num_rows: Mapping[str, int]) -> bytes:
    """Pack clients and their rows, in the order of the names.

    Raises:
        FrameError: A name that a server would refuse, or too many of them.
    """
    parts = [_HEADER.pack(_MAGIC, _VERSION, len(num_rows))]
    _check_count(len(num_rows))
    for name in sorted(num_rows):
        raw = name.encode("utf-8", "surrogatepass")
        _check_entry(raw, num_rows[name])
        parts.append(_ENTRY.pack(num_rows[name], len(raw)) + raw)
    return b"".join(parts)


def decode_registration(payload: bytes) -> dict[str, int]:
    """Take a node's answer apart; every length is checked before anything is read.

    Returns:
        Client -> rows it holds.

    Raises:
        ReplyError: The node refuses, or its answer is no roster of this version.
    """
    if len(payload) < _HEADER.size or payload[:4] != _MAGIC:
        raise ReplyError(_reason(payload))
    _, version, count = _HEADER.unpack_from(payload)
    if version != _VERSION:
        raise FrameError(
            f"a roster has version {_VERSION}, got {version}: run the same fedpet on the server "
            "and on the nodes."
        )
    _check_count(count)
    num_rows: dict[str, int] = {}
    start = _HEADER.size
    for _ in range(count):
        if start + _ENTRY.size > len(payload):
            raise FrameError(f"a roster of {count} clients ends after {len(num_rows)} of them.")
        rows, size = _ENTRY.unpack_from(payload, start)
        start += _ENTRY.size
        raw = payload[start : start + size]
        if len(raw) != size:
            raise FrameError(f"a roster of {count} clients ends after {len(num_rows)} of them.")
        start += size
        name = _check_entry(raw, rows)
        if name in num_rows:
            raise FrameError(f"a roster names each client once, got {name!r} twice.")
        num_rows[name] = rows
    if start != len(payload):
        raise FrameError(f"a roster ends after its clients, got {len(payload) - start} more bytes.")
    return num_rows


def _check_count(count: int) -> None:
    if not 1 <= count <= MAX_CLIENTS:
        raise FrameError(f"a node holds 1 to {MAX_CLIENTS} clients, got {count}.")


def _check_entry(raw: bytes, rows: int) -> str:
    """A client's name, fit to stand in a log."""
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        raise FrameError(f"a client's name is UTF-8, got {raw[:64]!r}.") from None
    if not 1 <= len(raw) <= MAX_NAME_BYTES or not name.strip():
        raise FrameError(
            f"a client's name has 1 to {MAX_NAME_BYTES} bytes and is not blank, got {len(raw)} "
            f"bytes, {name[:40]!r}."
        )
    if any(unicodedata.category(character)[0] == "C" for character in name):
        raise FrameError(f"a client's name has no control characters, got {name!r}.")
    if rows < 1:
        raise FrameError(f"client {name!r} has at least 1 row, got {rows}.")
    return name


def _reason(payload: bytes) -> str:
    """Why there is no roster: the node's own words, if it refused as it should."""
    parts = list(unpack_frames(payload, max_frames=1, max_payload_bytes=0))
    if len(parts) == 1 and isinstance(parts[0], Refusal):
        return parts[0].reason
    return "the answer to the roll call is neither a roster nor a refusal."
