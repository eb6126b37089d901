"""Test sums of coded vectors: those of the decoded ones, whichever the codec."""

from __future__ import annotations

import numpy as np
import pytest
from vectors import CODECS, draw

from fedpet.codec import VectorCodec, encode_with_feedback
from fedpet.codec.floats import pack_words
from fedpet.errors import FrameError

GROUPS = [(0, 5000), (5000, 5010), (5010, 5700), (5700, 6000)]


def weighted_sum(coding, vectors, rotation_seed=4):
    """Sum of the decoded vectors, and the accumulator's."""
    added = coding.accumulator(rotation_seed)
    expected = np.zeros(coding.count)
    for seed, vector in enumerate(vectors):
        payload = coding.encode(vector, seed=seed, rotation_seed=rotation_seed)
        added.add(payload, seed=seed, weight=seed + 1)
        decoded = coding.decode(payload, seed=seed, rotation_seed=rotation_seed)
        expected += (seed + 1) * decoded.astype(np.float64)
    return expected, added


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("head_codec", ["", "dither-5", "int8"])
def test_a_sum_of_payloads_is_the_sum_of_the_decoded_vectors(codec, head_codec):
    coding = VectorCodec.of(GROUPS, GROUPS[2:], codec=codec, head_codec=head_codec)
    vectors = [draw("laplace", 6000, seed=seed) for seed in range(5)]
    expected, added = weighted_sum(coding, vectors)
    assert added.weight == 15
    assert np.abs(added.total() - expected).max() < 1e-5 * np.abs(expected).max()
    assert added.mean() == pytest.approx(added.total() / 15)
    if "dither" not in codec + head_codec:
        assert (added.total() == expected).all()


def test_a_sum_can_be_read_between_additions():
    coding = VectorCodec.of(GROUPS, codec="dither-3")
    added = coding.accumulator(1)
    assert not added.mean().any()
    first = coding.encode(draw("gaussian", 6000), seed=0, rotation_seed=1)
    added.add(first, seed=0, weight=2)
    once = added.total()
    assert (added.total() == once).all()
    added.add(first, seed=0, weight=2)
    assert added.total() == pytest.approx(2 * once)


@pytest.mark.parametrize("head_codec", ["", "int8"])
def test_a_wrong_payload_leaves_the_sum_as_it_was(head_codec):
    coding = VectorCodec.of(GROUPS, GROUPS[2:], codec="dither-3", head_codec=head_codec)
    added = coding.accumulator(1)
    good = coding.encode(draw("gaussian", 6000), seed=0, rotation_seed=1)
    added.add(good, seed=0, weight=1)
    before = added.total()
    for wrong in (good[:-1], good + b"\0", good[:20], b""):
        with pytest.raises(FrameError):
            added.add(wrong, seed=0, weight=1)
    assert added.weight == 1
    assert (added.total() == before).all()


@pytest.mark.parametrize("codec", ["dither-3", "dither-3-raw", "float32", "topk-0.1+dither-4"])
def test_values_beyond_the_bound_are_refused(codec):
    coding = VectorCodec.of([(0, 4096)], codec=codec)
    payload = coding.encode(draw("gaussian", 4096) * np.float32(1e20), seed=0, rotation_seed=1)
    with pytest.raises(FrameError, match="at most 1e\\+18 in magnitude"):
        coding.accumulator(1, largest=1e18).add(payload, seed=0, weight=1)
    coding.accumulator(1, largest=1e25).add(payload, seed=0, weight=1)


def test_loose_values_beyond_the_bound_are_refused():
    coding = VectorCodec.of([(0, 64), (64, 70)], codec="dither-3")
    values = np.append(draw("gaussian", 64), np.full(6, 1e20, dtype=np.float32))
    payload = coding.encode(values, seed=0, rotation_seed=1)
    with pytest.raises(FrameError, match="magnitude"):
        coding.accumulator(1, largest=1e18).add(payload, seed=0, weight=1)


@pytest.mark.parametrize("scale", [np.nan, np.inf, -1.0, -0.0, 3e38])
def test_a_deviation_that_is_not_finite_is_never_added(scale):
    coding = VectorCodec.of([(0, 4096)], codec="dither-8-raw")
    payload = coding.encode(draw("gaussian", 4096), seed=0)
    forged_scale = pack_words(np.float32([scale]).view(np.uint32), entropy=False)
    forged = forged_scale + payload[len(forged_scale) :]
    with pytest.raises(FrameError, match=r"finite|magnitude"):
        coding.accumulator(0).add(forged, seed=0, weight=1)
    with pytest.raises(FrameError, match="finite"):
        coding.decode(forged, seed=0)


def test_error_feedback_works_on_a_shared_rotation():
    coding = VectorCodec.of(GROUPS, codec="topk-0.1+dither-3")
    added, residual, wanted = coding.accumulator(2), None, np.zeros(6000)
    for seed in range(20):
        values = draw("laplace", 6000, seed=seed)
        payload, residual = encode_with_feedback(
            values, residual, coding, seed=seed, rotation_seed=2
        )
        wanted += values
        added.add(payload, seed=seed, weight=1)
    assert np.abs(wanted - added.total() - residual).max() < 1e-3
