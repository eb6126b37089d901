"""The most memory that this process has held."""

from __future__ import annotations

from pathlib import Path

__all__ = ["peak_bytes"]


def peak_bytes() -> int:
    """Largest resident set since the program was started, in bytes. Linux only.

    Not `getrusage`: what it tells is never less than what the parent held when it started this
    process.
    """
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the kernel does not tell this process's peak of memory.")
