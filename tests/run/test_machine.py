"""A result says on what type of processor it was made: bytes are the same on one type alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedpet.utils import processor
from fedpet.utils.processor import processor_type

X86 = """\
processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC

processor\t: 1
cpu family\t: 99
"""
ARM = "processor\t: 0\nBogoMIPS\t: 48.00\nFeatures\t: fp asimd\n"


@pytest.mark.parametrize(
    ("cpuinfo", "told"), [(X86, "AMD EPYC (cpu family 25, model 17)"), (ARM, "aarch64")]
)
def test_the_processor_is_told_by_type(
    cpuinfo: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: Path, **options: Any) -> str:
        assert str(path) == "/proc/cpuinfo"
        return cpuinfo

    monkeypatch.setattr(processor.platform, "processor", lambda: "aarch64")
    monkeypatch.setattr(Path, "read_text", read)
    assert processor_type() == told
