"""Derive one seed for every purpose from the run's seed, and from nothing that can vary.

A seed made here depends on its parts alone: not on the worker that asks, nor on the order of
asking. That is half of law 6 (same seed, same bytes).
"""

from __future__ import annotations

import hashlib


def derive_seed(*parts: int | str) -> int:
    """Hash the parts to an unsigned 63-bit integer.

    Example:
        >>> derive_seed(0, "sample", 3) == derive_seed(0, "sample", 3)
        True
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def client_id64(client_id: str) -> int:
    """Return a client's number in messages: 64 bits of its name's SHA-256.

    It is never 0, which stands for the server.
    """
    number = int.from_bytes(hashlib.sha256(client_id.encode()).digest()[:8], "big")
    return number or 1
