"""A head's values under a codec of their own: a length more, and nothing where it is the same."""

from __future__ import annotations

import numpy as np
import pytest

from fedpet.codec import VectorCodec
from fedpet.errors import FrameError


def test_a_head_s_payload_is_cut_and_lengthened_in_vain():
    coding = VectorCodec.of(
        [(0, 40), (40, 60)], [(40, 60)], codec="float32-raw", head_codec="int8-raw"
    )
    values = np.random.default_rng(0).standard_normal(60).astype(np.float32)
    payload = coding.encode(values, seed=1)
    decoded = coding.decode(payload, seed=1)
    assert (decoded[:40] == values[:40]).all()
    assert 0 < np.abs(decoded[40:] - values[40:]).max() < 0.05
    assert len(payload) == coding.max_payload_bytes
    for wrong in (*(payload[:end] for end in range(len(payload))), payload + b"\0"):
        with pytest.raises(FrameError):
            coding.decode(wrong, seed=1)
    for length in (b"\0", b"\xff\xff\xff\x0f", b"\xff" * 9, b"\x80\x00"):
        with pytest.raises(FrameError):
            coding.decode(length + payload[2:], seed=1)


def test_a_head_s_codec_that_is_the_others_changes_no_byte():
    values = np.random.default_rng(0).standard_normal(180).astype(np.float32)
    groups = [(0, 150), (150, 180)]
    alone = VectorCodec.of(groups, codec="eden-4").encode(values, seed=3)
    for head in ("", "eden-4"):
        same = VectorCodec.of(groups, groups[1:], codec="eden-4", head_codec=head)
        assert same.encode(values, seed=3) == alone
    nothing = VectorCodec.of([(0, 180)], [(0, 180)], codec="eden-4", head_codec="int8")
    assert nothing.decode(nothing.encode(values, seed=3), seed=3) == pytest.approx(values, abs=0.05)
