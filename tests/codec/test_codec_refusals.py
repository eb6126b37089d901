"""Test what codecs refuse: values that are not finite, and payloads that are not what they say."""

from __future__ import annotations

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import CODECS, draw

from fedpet.codec import decode_values, encode_values
from fedpet.codec.entropy import varint
from fedpet.codec.floats import pack_words
from fedpet.errors import FrameError, TrainingError


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_never_encoded(codec, wrong):
    values = draw("gaussian", 100)
    values[17] = wrong
    with pytest.raises(TrainingError, match=r"must be finite, got -?(nan|inf) at position 17"):
        encode_values(values, codec, [(0, 100)], seed=0)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize("base", ["float32-raw", "bfloat16-raw"])
def test_a_payload_of_values_that_are_not_finite_is_refused(base, wrong):
    values = draw("gaussian", 100)
    values[17] = wrong
    words = values.view(np.uint32)
    if base == "bfloat16-raw":
        words = (words >> np.uint32(16)).astype(np.uint16)
    payload = pack_words(words, entropy=False)
    with pytest.raises(FrameError, match=r"must be finite, got (nan|inf) at position 17"):
        decode_values(payload, base, [(0, 100)], seed=0)


@pytest.mark.parametrize("scale", [np.nan, np.inf, -1.0, -0.0, 3e38])
def test_a_scale_that_is_not_finite_or_overflows_is_refused(scale):
    groups = [(0, 4096)]
    payload = encode_values(draw("gaussian", 4096), "eden-8-raw", groups, seed=0)
    forged_scale = pack_words(np.float32([scale]).view(np.uint32), entropy=False)
    forged = forged_scale + payload[len(forged_scale) :]
    with pytest.raises(FrameError, match="finite"):
        decode_values(forged, "eden-8-raw", groups, seed=0)


def test_a_symbol_beyond_the_codecs_range_is_refused():
    groups = [(0, 64)]
    payload = encode_values(draw("gaussian", 64), "int8-raw", groups, seed=0)
    with pytest.raises(FrameError, match="below 255"):
        decode_values(payload[:-1] + b"\xff", "int8-raw", groups, seed=0)
    payload = encode_values(draw("gaussian", 64), "int4-raw", groups, seed=0)
    with pytest.raises(FrameError, match="below 15"):
        decode_values(payload[:-32] + b"\xff" * 32, "int4-raw", groups, seed=0)


def test_more_values_than_top_k_may_send_are_refused():
    values, groups = draw("gaussian", 1000), [(0, 1000)]
    payload = encode_values(values, "topk-0.2+int8", groups, seed=0)
    with pytest.raises(FrameError, match="at most 100 of a group of 1000 values, got 200"):
        decode_values(payload, "topk-0.1+int8", groups, seed=0)


def test_a_plane_that_unpacks_to_more_than_the_plan_says_is_refused_and_never_unpacked():
    bomb = zstandard.ZstdCompressionParameters.from_level(
        19, write_content_size=True, format=zstandard.FORMAT_ZSTD1_MAGICLESS
    )
    packed = zstandard.ZstdCompressor(compression_params=bomb).compress(bytes(50_000_000))
    payload = b"\0" + (b"\x01" + varint(len(packed)) + packed) * 4
    with pytest.raises(FrameError, match="size of its own"):
        decode_values(payload, "float32", [(0, 1000)], seed=0)


def test_a_plane_that_asks_for_a_large_window_is_refused():
    groups = [(0, 3000)]
    payload = encode_values(np.zeros(3000, np.float32), "float32", groups, seed=0)
    assert payload[1] == 1  # the first plane is compressed: mode, length, descriptor, window
    for window in range(8 * 8, 256):
        forged = payload[:4] + bytes([window]) + payload[5:]
        with pytest.raises(FrameError, match="is damaged"):
            decode_values(forged, "float32", groups, seed=0)


@pytest.mark.parametrize("codec", CODECS)
def test_every_cut_and_every_longer_payload_is_refused(codec):
    values, groups = draw("gaussian", 500), [(0, 480), (480, 500)]
    payload = encode_values(values, codec, groups, seed=0)
    for end in range(0, len(payload), max(len(payload) // 60, 1)):
        with pytest.raises(FrameError):
            decode_values(payload[:end], codec, groups, seed=0)
    with pytest.raises(FrameError):
        decode_values(payload + b"\0", codec, groups, seed=0)


@settings(max_examples=120)
@given(data=st.data(), codec=st.sampled_from(CODECS))
def test_a_forged_payload_decodes_to_finite_values_or_is_refused(data, codec):
    groups = [(0, 100), (100, 110)]
    payload = bytearray(encode_values(draw("gaussian", 110), codec, groups, seed=0))
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, len(payload) - 1))
        payload[where] = data.draw(st.integers(0, 255))
    try:
        decoded = decode_values(payload, codec, groups, seed=0)
    except FrameError:
        return
    assert decoded.shape == (110,)
    assert np.isfinite(decoded).all()


@settings(max_examples=100)
@given(payload=st.binary(max_size=200), codec=st.sampled_from(CODECS))
def test_random_bytes_decode_to_finite_values_or_are_refused(payload, codec):
    try:
        decoded = decode_values(payload, codec, [(0, 40)], seed=0)
    except FrameError:
        return
    assert np.isfinite(decoded).all()


def test_groups_that_leave_a_gap_are_refused():
    with pytest.raises(ValueError, match=r"follow one another from 0, got \(60, 100\) behind 50"):
        encode_values(draw("gaussian", 100), "int8", [(0, 50), (60, 100)], seed=0)
    with pytest.raises(ValueError, match="groups end at 50"):
        encode_values(draw("gaussian", 100), "int8", [(0, 50)], seed=0)
