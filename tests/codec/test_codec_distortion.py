"""Test a codec's error: as the theory says, without bias, and group by group."""

from __future__ import annotations

import numpy as np
import pytest
from vectors import LOSSLESS, PLAIN_CODECS, draw, roundtrip, squared_error

from fedpet.codec import decode_values, encode_values


@pytest.mark.parametrize("distribution", ["gaussian", "laplace", "student-t3"])
@pytest.mark.parametrize(
    ("bits", "expected", "entropy"),
    # Lloyd-Max distortion D of a unit normal variable under the unbiased scale, D / (1 - D), and
    # the entropy of its symbols.
    [(1, 0.573, 1.0), (2, 0.133, 1.91), (3, 0.0358, 2.82), (4, 0.0096, 3.77)],
)
def test_eden_errs_and_weighs_as_much_as_the_theory_says_on_any_distribution(
    bits, expected, entropy, distribution
):
    values = draw(distribution, 400_000)
    codec, groups = f"eden-{bits}", [(0, len(values))]
    payload = encode_values(values, codec, groups, seed=1)
    decoded = decode_values(payload, codec, groups, seed=1)
    assert squared_error(values, decoded) == pytest.approx(expected, rel=0.03)
    assert 8 * len(payload) / len(values) == pytest.approx(entropy, rel=0.02)


@pytest.mark.parametrize("distribution", ["gaussian", "laplace", "student-t3", "spike"])
def test_eden_at_6_and_8_bits_errs_by_less_than_7e_4_and_5e_5(distribution):
    values = draw(distribution, 100_000)
    assert squared_error(values, roundtrip(values, "eden-6")) <= 7e-4
    assert squared_error(values, roundtrip(values, "eden-8")) <= 5e-5


@pytest.mark.parametrize(
    ("codec", "distribution", "expected", "most_bits"),
    [
        # Unbiased stochastic rounding with a scale for each block: the coder itself is within 2 %.
        ("int8", "gaussian", 1.23e-4, 7.34),
        ("int8", "laplace", 3.05e-4, 6.63),
        ("int4", "gaussian", 2.33e-2, 3.66),
        ("int4", "laplace", 4.05e-2, 3.26),
        ("int4", "student-t3", 7.1e-2, 3.07),
    ],
)
def test_integers_err_as_their_blocks_say(codec, distribution, expected, most_bits):
    values = draw(distribution, 400_000)
    payload = encode_values(values, codec, [(0, len(values))], seed=1)
    decoded = decode_values(payload, codec, [(0, len(values))], seed=1)
    assert squared_error(values, decoded) == pytest.approx(expected, rel=0.03)
    assert 8 * len(payload) / len(values) < most_bits


def bias(values, codec, num_seeds):
    """Return the mean error over what chance alone makes of it: near 1 without bias."""
    total = np.zeros(len(values))
    squares = 0.0
    for seed in range(num_seeds):
        error = roundtrip(values, codec, seed=seed).astype(np.float64) - values
        total += error
        squares += error @ error
    return (total @ total) / squares, (total @ values) / num_seeds / (values @ values)


@pytest.mark.parametrize("codec", ["bfloat16-raw", "int8-raw", "int4-raw"])
@pytest.mark.parametrize("distribution", ["gaussian", "student-t3"])
def test_over_seeds_rounding_has_no_bias(codec, distribution):
    ratio, along = bias(draw(distribution, 3000), codec, 200)
    assert 0.8 < ratio < 1.2  # a bias of a tenth of one error would make it 4
    assert abs(along) < 1e-3


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("distribution", ["gaussian", "student-t3", "spike"])
def test_over_seeds_eden_has_no_bias(bits, distribution):
    ratio, along = bias(draw(distribution, 3000), f"eden-{bits}-raw", 150)
    assert 0.85 < ratio < 1.15
    assert abs(along) < 1e-6  # the scale sees to that, seed by seed


def test_the_mean_of_many_clients_errs_by_their_number_less():
    values = draw("gaussian", 5000)
    mean = np.mean([roundtrip(values, "eden-2", seed=client) for client in range(50)], axis=0)
    assert squared_error(values, mean) == pytest.approx(0.133 / 50, rel=0.1)


@pytest.mark.parametrize("codec", [c for c in PLAIN_CODECS if c not in LOSSLESS])
def test_a_loud_group_does_not_ruin_the_others(codec):
    quiet, loud = draw("gaussian", 5000), 1e6 * draw("gaussian", 700, seed=1)
    groups = [(0, 5000), (5000, 5700)]
    together = roundtrip(np.concatenate((quiet, loud)), codec, groups, seed=3)
    alone = roundtrip(quiet, codec, seed=3)
    assert squared_error(quiet, together[:5000]) == pytest.approx(
        squared_error(quiet, alone), rel=0.1
    )
