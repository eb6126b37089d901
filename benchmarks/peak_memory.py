"""Read the peak memory of this process."""

from __future__ import annotations

from pathlib import Path

__all__ = ["peak_bytes"]


def peak_bytes() -> int:
    """Return the largest resident set since the program was started, in bytes. Linux only.

    Not `getrusage`: its figure is at least the parent's at the start of this process.
    """
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the kernel does not tell this process's peak of memory.")
