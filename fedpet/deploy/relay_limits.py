"""Bound what a node may ask of the server: bytes, requests a second, seconds."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

__all__ = ["Bucket", "Limits"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bound what a node may ask of the server.

    Attributes:
        reply_bytes: Most bytes of one reply.
        object_bytes: Of one request that brings a part of a reply; Flower cuts at 5 MiB.
        message_bytes: Of a request that announces a reply.
        other_bytes: Of any other request.
        held_bytes: Of all bodies that are read at one time.
        rate: Requests a second of a node, over time.
        burst: Requests at once.
        stranger_rate: Requests a second of all unknown keys of one address.
        body_seconds: In which a body must have come.
        folder_seconds: For which the folder of allowed nodes is taken to be as it was.
        sessions: Replies of a node whose bytes are remembered, the newest.
    """

    reply_bytes: int = 64 << 20
    object_bytes: int = (5 << 20) + (64 << 10)
    message_bytes: int = 1 << 20
    other_bytes: int = 64 << 10
    held_bytes: int = 256 << 20
    rate: float = 30.0
    burst: float = 300.0
    stranger_rate: float = 1.0
    body_seconds: float = 180.0
    folder_seconds: float = 1.0
    sessions: int = 1024

    def of_path(self, word: str) -> int:
        """Return the most bytes of a body to this path."""
        sizes = {"push-object": self.object_bytes, "push-messages": self.message_bytes}
        return sizes.get(word, self.other_bytes)


@dataclass
class Bucket:
    """Let through so many requests a second, after so many at once."""

    rate: float
    burst: float
    level: float = field(init=False)
    at: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.level = self.burst

    def take(self) -> bool:
        now = time.monotonic()
        self.level = min(self.burst, self.level + (now - self.at) * self.rate)
        self.at = now
        if self.level < 1:
            return False
        self.level -= 1
        return True
