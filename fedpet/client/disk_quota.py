"""Keep a device's plans and state within a quota: what was not used for longest goes first.

    CACHE/plans/*.plan      a plan each
    CACHE/state/PLAN/RUN/   the state of a run each

A plan or a run is used when a message names it, which its time of change says. The one in use
stays; where it does not fit alone, it is refused.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from fedpet.errors import PlanError

__all__ = ["make_room"]


def make_room(cache: Path, needed: int, quota: int, *, keep: Path) -> None:
    """Remove plans and runs until so many bytes more fit the quota.

    Args:
        cache: The node's cache.
        needed: Bytes that are about to be written.
        quota: Most bytes of plans and state; 0 sets no bound.
        keep: The plan's file, or the run's folder, that is in use.

    Raises:
        PlanError: They do not fit, with all others removed.
    """
    if not quota:
        return
    sizes = {path: _size(path) for path in (*cache.glob("plans/*.plan"), *cache.glob("state/*/*"))}
    total = sum(sizes.values()) + needed
    for path in sorted(sizes, key=_last_use):
        if total <= quota:
            return
        if path != keep:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(True)
            total -= sizes[path]
    if total > quota:
        raise PlanError(
            f"the plan and its state need {total} bytes on this node's disk, and it gives {quota}: "
            "its owner may raise max-disk-mib in node.toml."
        )


def _size(path: Path) -> int:
    files = path.iterdir() if path.is_dir() else [path]
    try:
        return sum(file.stat().st_size for file in files)
    except FileNotFoundError:  # another process removed it
        return 0


def _last_use(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
