"""Name the processor's type, on which the same seed gives the same bytes."""

from __future__ import annotations

import platform
from pathlib import Path

__all__ = ["processor_type"]


def processor_type() -> str:
    """Return its name, and on x86 its family and model."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    info = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = info.get("model name", "") or platform.processor()
    numbers = [f"{key} {info[key]}" for key in ("cpu family", "model") if key in info]
    return f"{name} ({', '.join(numbers)})" if numbers else name
