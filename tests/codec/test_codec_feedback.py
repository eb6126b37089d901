"""Top-k sends the largest, and error feedback loses nothing but the last residual."""

from __future__ import annotations

import numpy as np
import pytest
from vectors import draw, roundtrip

from fedpet.codec import VectorCodec, decode_values, encode_with_feedback


def test_top_k_sends_the_largest_of_every_group_and_no_others():
    values = draw("student-t3", 3000)
    groups = [(0, 2000), (2000, 3000)]
    decoded = roundtrip(values, "topk-0.1+float32", groups)
    for start, stop in groups:
        kept = np.flatnonzero(decoded[start:stop])
        assert len(kept) == (stop - start) // 10
        order = np.argsort(-np.abs(values[start:stop]))
        assert set(kept) == set(order[: len(kept)])
        assert (decoded[start:stop][kept] == values[start:stop][kept]).all()


def test_top_k_never_spends_a_position_on_a_zero_and_takes_the_earlier_of_equals():
    values = np.zeros(1000, dtype=np.float32)
    values[[3, 500, 999]] = 1.0
    assert np.flatnonzero(roundtrip(values, "topk-0.1+float32")).tolist() == [3, 500, 999]
    assert np.flatnonzero(roundtrip(values, "topk-0.002+float32")).tolist() == [3, 500]


@pytest.mark.parametrize("codec", ["topk-0.1+eden-4", "eden-1", "int4", "bfloat16"])
def test_with_error_feedback_all_that_is_lost_is_the_last_residual(codec):
    groups = [(0, 4000), (4000, 4100)]
    coding = VectorCodec.of(groups, codec=codec)
    wanted, sent, residual = np.zeros(4100), np.zeros(4100), None
    norms = []
    for round_ in range(60):
        values = draw("laplace", 4100, seed=round_)
        payload, residual = encode_with_feedback(values, residual, coding, seed=round_)
        wanted += values
        sent += decode_values(payload, codec, groups, seed=round_)
        norms.append(np.linalg.norm(residual))
    assert np.abs(wanted - sent - residual).max() < 1e-3
    assert norms[-1] < 1.5 * max(norms[:40])  # it does not grow without end


def test_error_feedback_leaves_its_inputs_as_they_are():
    values, residual = draw("gaussian", 500), draw("gaussian", 500, seed=1)
    before = values.copy(), residual.copy()
    encode_with_feedback(values, residual, VectorCodec("topk-0.1+eden-4", ((0, 500),)), seed=0)
    assert (values == before[0]).all()
    assert (residual == before[1]).all()


def test_a_residual_of_another_plan_is_refused():
    with pytest.raises(ValueError, match="another plan"):
        encode_with_feedback(
            draw("gaussian", 500),
            np.zeros(400, np.float32),
            VectorCodec("int4", ((0, 500),)),
            seed=0,
        )
