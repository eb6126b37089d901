"""Test the dither codecs: their error is a uniform one, whatever is sent, and senders' differ."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from vectors import draw, squared_error

from fedpet.codec import decode_values, encode_values
from fedpet.codec.dither import (
    STEPS,
    dequantise,
    deviations,
    quantise,
    rotation_of,
    windows_of,
)  # fmt: skip

BITS = tuple(STEPS)
SHAPES = {
    "spike": lambda n: np.eye(1, n, n // 3)[0],
    "constant": np.ones,
    "two spikes": lambda n: np.eye(1, n, 0)[0] - np.eye(1, n, n - 1)[0],
    "alternating": lambda n: np.resize([1.0, -1.0], n),
    "ramp": np.arange,
}


def sent(values, codec, *, seed, rotation_seed=3):
    """The vector as its receiver decodes it, float64."""
    groups = [(0, len(values))]
    seeds = {"seed": seed, "rotation_seed": rotation_seed}
    payload = encode_values(values, codec, groups, **seeds)
    return decode_values(payload, codec, groups, **seeds).astype(np.float64)


def error_of_mean(values, codec, num_senders, **shared):
    """Squared error of the mean of what senders send, relative to the mean's squared norm."""
    vectors = [values[index % len(values)] for index in range(num_senders)]
    decoded = [sent(vector, codec, seed=index, **shared) for index, vector in enumerate(vectors)]
    return squared_error(np.mean(vectors, axis=0, dtype=np.float64), np.mean(decoded, axis=0))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("distribution", ["gaussian", "laplace", "student-t3", "spike"])
def test_the_error_is_a_twelfth_of_the_squared_step_on_any_distribution(bits, distribution):
    values = draw(distribution, 100_000)
    errors = [squared_error(values, sent(values, f"dither-{bits}", seed=seed)) for seed in range(3)]
    assert np.mean(errors) == pytest.approx(STEPS[bits] ** 2 / 12, rel=0.03)


@pytest.mark.parametrize(
    ("bits", "of_eden"),  # Lloyd-Max distortion under the unbiased scale, and its coded bits
    [(1, (0.571, None)), (2, (0.1332, 1.92)), (3, (0.0358, 2.82)), (4, (0.0096, 3.77)),
     (5, (0.00251, 4.74)), (6, (6.44e-4, 5.72)), (7, (1.63e-4, 6.71)), (8, (4.13e-5, 7.71))],
)  # fmt: skip
def test_a_dither_codec_errs_less_than_eden_and_weighs_less_from_2_bits_on(bits, of_eden):
    error, coded_bits = of_eden
    assert STEPS[bits] ** 2 / 12 < error
    values = draw("gaussian", 200_000)
    payload = encode_values(values, f"dither-{bits}", [(0, len(values))], seed=0)
    if coded_bits:
        assert 8 * len(payload) / len(values) < coded_bits
    else:
        assert 8 * len(payload) / len(values) < 1.12


@settings(max_examples=40)
@given(
    shape=st.sampled_from(sorted(SHAPES)),
    count=st.sampled_from([32, 33, 63, 64, 100, 384, 4095, 4097]),
    bits=st.sampled_from([1, 2, 3, 5, 8]),
    rotation_seed=st.integers(0, 2**40),
)
def test_over_dithers_alone_the_estimate_has_no_bias(shape, count, bits, rotation_seed):
    values, num_seeds = SHAPES[shape](count).astype(np.float32), 60
    total, squares = np.zeros(count), 0.0
    for seed in range(num_seeds):
        error = sent(values, f"dither-{bits}-raw", seed=seed, rotation_seed=rotation_seed) - values
        total += error
        squares += error @ error
    # 1 without bias, up to chance, more of it the fewer the values; num_seeds if all err alike.
    assert (total @ total) / squares < 1 + 5 * (2 / count) ** 0.5
    bound = 6 * STEPS[bits] / 12**0.5 / (num_seeds**0.5 * np.linalg.norm(values) + 1e-9)
    assert abs(total @ values) / num_seeds / (values @ values) < bound * np.linalg.norm(values)


@settings(max_examples=60)
@given(
    values=arrays(np.float32, st.integers(32, 600), elements=st.floats(-1e4, 1e4, width=32)),
    bits=st.integers(1, 8),
    seed=st.integers(0, 2**64),
)
def test_no_rotated_value_errs_by_more_than_half_a_step(values, bits, seed):
    windows = windows_of([(0, len(values))])
    rotated = rotation_of(windows, seed).forward(values.copy())
    words = np.random.default_rng(0).integers(0, 2**16, len(values), dtype=np.uint16)
    steps = deviations(rotated, windows) * np.float32(STEPS[bits])
    steps[steps < 1e-25] = 0
    back = dequantise(quantise(rotated, words, windows, steps), words, windows, steps)
    wide = np.repeat(steps, windows.lengths).astype(np.float64)
    rounding = 1e-5 * np.abs(rotated) + 1e-20
    assert (np.abs(back - rotated.astype(np.float64)) <= wide / 2 + rounding)[wide > 0].all()


ALIKE = [draw("gaussian", 6000)]
CORRELATED = [ALIKE[0] + draw("laplace", 6000, seed=1 + index) for index in range(40)]
INDEPENDENT = [draw("student-t3", 6000, seed=index) for index in range(40)]


@pytest.mark.parametrize("bits", [1, 3, 5])
@pytest.mark.parametrize("vectors", [ALIKE, CORRELATED, INDEPENDENT])
def test_the_mean_of_senders_on_one_rotation_errs_by_their_number_less(bits, vectors):
    mean = np.mean(vectors, axis=0, dtype=np.float64)
    norms = np.mean([vector.astype(np.float64) @ vector for vector in vectors])
    expected = STEPS[bits] ** 2 / 12 / 40 * norms / (mean @ mean)
    assert error_of_mean(vectors, f"dither-{bits}", 40) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("vectors", [ALIKE, CORRELATED, INDEPENDENT])
def test_the_mean_errs_less_than_that_of_eden_with_a_rotation_each(vectors):
    # EDEN draws its rotation from the sender's seed.
    assert error_of_mean(vectors, "dither-3", 40) < 1.05 * error_of_mean(vectors, "eden-3", 40)


def test_senders_that_share_a_rotation_and_a_dither_err_alike():
    # So the dither is what makes a shared rotation sound.
    own = error_of_mean(ALIKE, "dither-3", 40)
    shared = np.mean([sent(ALIKE[0], "dither-3", seed=0) for _ in range(40)], axis=0)
    assert squared_error(ALIKE[0], shared) > 30 * own


def test_without_a_rotation_seed_the_rotation_is_the_sender_s_own():
    values = draw("gaussian", 5000)
    groups = [(0, 5000)]
    payload = encode_values(values, "dither-4", groups, seed=9)
    assert payload == encode_values(values, "dither-4", groups, seed=9, rotation_seed=9)
    assert payload != encode_values(values, "dither-4", groups, seed=9, rotation_seed=8)
    wrong = decode_values(payload, "dither-4", groups, seed=9, rotation_seed=8)
    assert squared_error(values, wrong) > 1


@pytest.mark.parametrize("bits", BITS)
def test_a_spike_in_a_full_window_stays_within_the_bound_of_symbols(bits):
    # Against the rotation: the vector whose rotated window is one spike of 64 deviations.
    windows = windows_of([(0, 4096)])
    spike = np.zeros(4096, dtype=np.float32)
    spike[77] = 1
    values = rotation_of(windows, 3).backward(spike.copy())
    for codec in (f"dither-{bits}", f"dither-{bits}-raw"):
        decoded = sent(values, codec, seed=1)
        assert squared_error(values, decoded) < STEPS[bits] ** 2 / 10
