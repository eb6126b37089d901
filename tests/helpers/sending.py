"""Codecs of tests: lossless both ways, but for what a test names itself."""

from __future__ import annotations

from typing import Any

from fedpet.config import CodecConfig

LOSSLESS = {"uplink": "float32", "downlink": "float32", "downlink_mode": "delta"}


def codec_of(**changes: Any) -> CodecConfig:
    """Return a codec that sends float32 both ways where `changes` say nothing else."""
    return CodecConfig(**LOSSLESS | changes)
