"""Test what every codec promises: law 5, what is decoded is what was encoded."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from vectors import CODECS, LOSSLESS, draw, roundtrip

from fedpet.codec import decode_values, encode_values

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True)


@pytest.mark.parametrize("codec", LOSSLESS)
@given(values=arrays(np.float32, st.integers(0, 300), elements=FINITE))
def test_float32_gives_back_the_same_bits(codec, values):
    decoded = roundtrip(values, codec)
    assert decoded.dtype == np.float32
    assert decoded.tobytes() == values.tobytes()  # minus zero and subnormals too


@settings(max_examples=60)
@given(
    values=arrays(np.float32, st.integers(0, 300), elements=FINITE),
    codec=st.sampled_from([c for c in CODECS if "eden" not in c and "dither" not in c]),
    seed=st.integers(0, 2**128),
)
@example(values=np.full(3, np.finfo(np.float32).max), codec="int8", seed=0)
@example(values=np.array([3.3961777e38], dtype=np.float32), codec="int4", seed=0)
def test_every_finite_vector_decodes_to_a_finite_one_of_its_length(values, codec, seed):
    decoded = roundtrip(values, codec, seed=seed)
    assert decoded.shape == values.shape
    assert np.isfinite(decoded).all()


@settings(max_examples=60)
@given(
    values=arrays(
        np.float32, st.integers(0, 300), elements=st.floats(-(2.0**99), 2.0**99, width=32)
    ),
    codec=st.sampled_from([c for c in CODECS if c.startswith(("eden", "dither"))]),
    seed=st.integers(0, 2**64),
)
def test_every_vector_up_to_1e30_can_be_rotated(values, codec, seed):
    decoded = roundtrip(values, codec, seed=seed)
    assert np.isfinite(decoded).all()
    norm = np.linalg.norm(values.astype(np.float64))
    # At worst (a window of few values) the error is of the vector's own size, never more of it.
    # A window whose values are below 2^-100 is sent as zeros by "dither" codecs.
    assert np.linalg.norm(decoded - values.astype(np.float64)) <= 2 * norm + 1e-28


@settings(max_examples=60)
@given(values=arrays(np.float32, st.integers(1, 3000), elements=st.floats(-1e4, 1e4, width=32)))
def test_an_integer_codec_errs_by_less_than_its_blocks_scale(values):
    for codec, limit, block in (("int8", 127, 1024), ("int4", 7, 64)):
        error = np.abs(roundtrip(values, codec) - values)
        for start in range(0, len(values), block):
            part = slice(start, start + block)
            # bfloat16 rounds the scale up by 2^-7 at most.
            scale = np.abs(values[part]).max() / limit * (1 + 2**-7)
            assert error[part].max() <= scale * (1 + 1e-6) + 1e-40


@given(values=arrays(np.float32, st.integers(1, 300), elements=FINITE))
def test_bfloat16_errs_by_less_than_its_last_place(values):
    decoded = roundtrip(values, "bfloat16").astype(np.float64)
    assert (np.abs(decoded - values) <= np.abs(values.astype(np.float64)) * 2**-7 + 1e-40).all()


def test_bfloat16_keeps_what_bfloat16_has():
    values = (draw("gaussian", 5000).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    assert roundtrip(values, "bfloat16").tobytes() == values.tobytes()


@pytest.mark.parametrize("codec", CODECS)
def test_groups_of_any_sizes_keep_their_order(codec):
    sizes = [1, 0, 2, 31, 32, 33, 384, 5000, 0, 4096]
    stops = np.cumsum(sizes).tolist()
    groups = list(zip([0, *stops[:-1]], stops, strict=True))
    values = draw("gaussian", stops[-1])
    decoded = roundtrip(values, codec, groups)
    for start, stop in groups:
        if stop - start > 300:
            assert np.corrcoef(decoded[start:stop], values[start:stop])[0, 1] > 0.5


@pytest.mark.parametrize("codec", CODECS)
def test_no_values_take_no_bytes(codec):
    assert encode_values(np.empty(0, np.float32), codec, [], seed=0) == b""
    assert len(decode_values(b"", codec, [(0, 0)], seed=0)) == 0


@pytest.mark.parametrize("codec", [c for c in CODECS if not c.endswith("-raw")])
def test_zeros_cost_next_to_nothing(codec):
    zeros = np.zeros(54_321, dtype=np.float32)
    assert len(encode_values(zeros, codec, [(0, 54_321)], seed=0)) < 130
    assert not roundtrip(zeros, codec).any()
