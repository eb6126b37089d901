"""Keep the state of a run on a node: references, and the residuals of its clients.

    CACHE/state/PLAN DIGEST/RUN/reference-TIER        the last reference, see
                                                      fedpet/protocol/shared_reference.py
                               /CLIENT.0, CLIENT.1    residuals of the client's last two rounds

The server names the run in every message, by a number drawn when it began and kept in its
checkpoint: another run of the same plan finds nothing of this one, a resumed run finds all.

A residual is what a lossy codec lost of an update (fedpet/codec/error_feedback.py). A client learns
only at its next request whether its last payload was accepted, so it keeps two: the residual of the
round that the server last accepted, and that of the round after. All processes of a machine share
the files, since another worker may train a client in its next round; a round has one worker for
each client, and files are written atomically.

A file is a safetensors file of one float32 vector "values", whose metadata hold the round and a
CRC-32 of both. A file that is absent, damaged or of another length is no file.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedpet.client.disk_quota import make_room
from fedpet.errors import FrameError
from fedpet.protocol.frame import RefusalCode, StateMissingError
from fedpet.protocol.shared_reference import Reference
from fedpet.utils.atomic_write import atomic_write, untouched

__all__ = ["StateStore", "state_folder"]

_KEEP_SECONDS = 7 * 24 * 3600.0  # of a run that no message came of
_MAX_HEADER_BYTES = 1000


def state_folder(cache: Path, digest: bytes, run: int) -> Path:
    """Return the folder of a run's state."""
    return cache / "state" / digest.hex() / f"{run:016x}"


class StateStore:
    """Store the state of one run.

    Args:
        folder: Of `state_folder`; made, and folders of runs that ended long ago are removed.
        quota: Most bytes of plans and state; 0 sets no bound.
    """

    def __init__(self, folder: Path, *, quota: int = 0) -> None:
        self.folder, self._quota = folder, quota
        self._references: dict[int, Reference] = {}
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)
        for run in untouched(folder.parent.parent.glob("*/*"), _KEEP_SECONDS):
            shutil.rmtree(run, ignore_errors=True)

    # -- references -------------------------------------------------------------------------

    def reference_in_memory(self, tier: int) -> Reference | None:
        """Return the last reference that this process followed."""
        return self._references.get(tier)

    def reference_on_disk(self, tier: int, count: int) -> Reference | None:
        """Return the last reference that any process of this machine followed."""
        stored = _read(self.folder / f"reference-{tier}", count)
        return None if stored is None else Reference(*stored)

    def keep_reference(self, tier: int, reference: Reference) -> None:
        """Store a reference in the place of the one before."""
        before = self._references.get(tier)
        self._references[tier] = reference
        if before is None or before.server_round != reference.server_round:
            self._write(self.folder / f"reference-{tier}", reference.server_round, reference.values)

    # -- residuals --------------------------------------------------------------------------

    def accepted_residual(
        self, client: int, server_round: int, accepted: int, count: int
    ) -> np.ndarray:
        """Return the residual of a client's last accepted round.

        Args:
            client: Its number.
            server_round: The round that the client is asked to train in.
            accepted: The last round of which the server took its payload, from 1.
            count: Number of values that the residual must have.

        Returns:
            float32, (count,).

        Raises:
            FrameError: The accepted round is not before this one.
            StateMissingError: The residual is not held here any more.
        """
        if accepted >= server_round:
            raise FrameError(
                f"the last accepted round must be before this one, which is {server_round}, got "
                f"{accepted}."
            )
        residual = self.residual(client, accepted, count)
        if residual is None:
            raise StateMissingError(RefusalCode.RESIDUAL_MISSING)
        return residual

    def residual(self, client: int, server_round: int, count: int) -> np.ndarray | None:
        """Return the residual of a client's round, float32, (count,); None where it is absent."""
        for path in self._residual_files(client):
            stored = _read(path, count)
            if stored is not None and stored[0] == server_round:
                return stored[1]
        return None

    def keep_residual(
        self, client: int, server_round: int, residual: np.ndarray, *, accepted: int
    ) -> None:
        """Store a round's residual beside that of the last accepted round."""
        first, second = self._residual_files(client)
        stored = _read(first, len(residual)) if accepted else None
        is_accepted = stored is not None and stored[0] == accepted
        self._write(second if is_accepted else first, server_round, residual)

    def _residual_files(self, client: int) -> tuple[Path, Path]:
        return self.folder / f"{client:016x}.0", self.folder / f"{client:016x}.1"

    def _write(self, path: Path, server_round: int, values: np.ndarray) -> None:
        values = np.ascontiguousarray(values, dtype=np.float32)
        metadata = {"round": str(server_round), "crc32": _checksum(server_round, values)}
        content = save({"values": values}, metadata=metadata)
        # Without the folder the run is over, and a late worker has nothing to store.
        with contextlib.suppress(FileNotFoundError):
            before = path.stat().st_size if path.exists() else 0
            cache = self.folder.parent.parent.parent
            make_room(cache, len(content) - before, self._quota, keep=self.folder)
            atomic_write(path, content, shared=True)


def _read(path: Path, count: int) -> tuple[int, np.ndarray] | None:
    """Return round and values of a file; None where it does not hold so many values."""
    try:
        if path.stat().st_size > 4 * count + _MAX_HEADER_BYTES:
            return None
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            values = np.array(file.get_tensor("values"))
    except (OSError, SafetensorError, TypeError):
        return None
    text = metadata.get("round", "")
    if values.dtype != np.float32 or values.shape != (count,) or not text.isdecimal():
        return None
    if metadata.get("crc32") != _checksum(int(text), values) or not np.isfinite(values).all():
        return None
    return int(text), values


def _checksum(server_round: int, values: np.ndarray) -> str:
    little = values.astype("<f4", copy=False).tobytes()
    return f"{zlib.crc32(little, zlib.crc32(str(server_round).encode())):08x}"
