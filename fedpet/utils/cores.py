"""Count the cores that this process may use."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """Return the number of cores for work that nothing else competes with.

    OMP_NUM_THREADS where it is set, as for any program that computes; else the cores that the
    process may run on (`taskset`, a scheduler's cpuset), where the system tells.
    """
    named = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if named.isdecimal() and int(named):
        return int(named)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
