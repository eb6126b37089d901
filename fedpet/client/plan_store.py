"""Keep the plans of a node on disk, each under its digest, whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from fedpet.client.disk_quota import make_room
from fedpet.errors import PlanError
from fedpet.protocol.frame import RefusalCode, StateMissingError
from fedpet.protocol.plan import Plan
from fedpet.utils.atomic_write import atomic_write, untouched

__all__ = ["PlanStore"]

KEEP_SECONDS = 90 * 24 * 3600.0  # of a plan that no message asked for


class PlanStore:
    """Store plans in a folder that processes share.

    Args:
        cache: The node's cache; plans lie in its folder "plans".
        quota: Most bytes of plans and state; 0 sets no bound.
    """

    def __init__(self, cache: Path, *, quota: int = 0) -> None:
        self._cache, self._quota = cache, quota
        self._folder = cache / "plans"

    def put(self, plan: bytes, digest: bytes) -> None:
        """Store a plan, and remove plans that were not used for long.

        Raises:
            PlanError: The bytes have another digest, or do not fit the quota.
            OSError: The disk does not take them.
        """
        if Plan.digest(plan) != digest:
            raise PlanError("the plan's bytes do not have the digest that the frame names.")
        if self._read(digest) is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            for old in untouched(self._folder.iterdir(), KEEP_SECONDS):
                old.unlink(missing_ok=True)
            make_room(self._cache, len(plan), self._quota, keep=self.path(digest))
            atomic_write(self.path(digest), plan, durable=True, shared=True)

    def get(self, digest: bytes) -> bytes:
        """Return the bytes of a plan.

        Raises:
            StateMissingError: No undamaged plan of this digest lies here.
        """
        plan = self._read(digest)
        if plan is None:
            raise StateMissingError(RefusalCode.PLAN_MISSING)
        return plan

    def keep_registration(self, digest: bytes, registration: bytes) -> None:
        """Store what the node has registered for a plan.

        It is written each time: a node whose disk is full could not take part.

        Raises:
            OSError: The disk does not take it.
        """
        path = self.path(digest).with_suffix(".registration")
        atomic_write(path, registration, durable=True, shared=True)

    def registration(self, digest: bytes) -> bytes:
        """Return what the node has registered for a plan; b"" of one that has not."""
        try:
            return self.path(digest).with_suffix(".registration").read_bytes()
        except OSError:
            return b""

    def path(self, digest: bytes) -> Path:
        """Return the file of a plan."""
        return self._folder / f"{digest.hex()}.plan"

    def _read(self, digest: bytes) -> bytes | None:
        path = self.path(digest)
        try:
            plan = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        return plan if Plan.digest(plan) == digest else None
