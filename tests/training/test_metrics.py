"""Metrics against values worked out by hand, and the identities that tie them together."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpet.data import Task
from fedpet.training.metrics import metric_value


def classes(metric: str, num_classes: int = 2) -> Task:
    return Task("classification", tuple(f"c{i}" for i in range(num_classes)), metric)


def outputs(predictions: list[int], num_classes: int) -> np.ndarray:
    return np.eye(num_classes, dtype=np.float32)[predictions]


REGRESSION = Task("regression", (), "pearson")

# labels x predictions: 6 true positives, 1 false negative, 2 false positives, 3 true negatives
TRUE = [1] * 7 + [0] * 5
PREDICTED = [1] * 6 + [0] + [1, 1] + [0] * 3


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("accuracy", 9 / 12),
        ("f1", 2 * 6 / (2 * 6 + 2 + 1)),
        ("matthews", (6 * 3 - 2 * 1) / math.sqrt(8 * 7 * 5 * 4)),
    ],
)
def test_two_classes_give_the_textbook_formula_in_true_and_false_positives(
    metric: str, expected: float
) -> None:
    value = metric_value(classes(metric), outputs(PREDICTED, 2), np.array(TRUE))
    assert value == pytest.approx(expected, abs=1e-12)


def test_f1_of_more_classes_is_the_mean_over_those_that_occur() -> None:
    # class 0: tp 2, fp 1, fn 0; class 1: tp 1, fp 0, fn 1; class 2: fn 1; class 3 never occurs
    labels, predictions = [0, 0, 1, 1, 2], [0, 0, 1, 0, 1]
    # ... and class 1 is predicted once more where 2 was right: fp 1
    value = metric_value(classes("f1", 4), outputs(predictions, 4), np.array(labels))
    assert value == pytest.approx((4 / 5 + 2 / 4 + 0) / 3, abs=1e-12)


def test_matthews_of_three_classes_is_gorodkins_correlation() -> None:
    labels, predictions = [0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 2, 0]
    # n 6, right 4; labels (2, 2, 2), predictions (2, 3, 1)
    expected = (6 * 4 - 12) / math.sqrt((36 - 14) * (36 - 12))
    value = metric_value(classes("matthews", 3), outputs(predictions, 3), np.array(labels))
    assert value == pytest.approx(expected, abs=1e-12)


def test_pearson_of_four_points_is_the_value_worked_out_by_hand() -> None:
    logits = np.array([[1.0], [2.0], [3.0], [4.0]], dtype=np.float32)
    labels = np.array([1.0, 3.0, 2.0, 4.0], dtype=np.float32)
    assert metric_value(REGRESSION, logits, labels) == pytest.approx(0.8, abs=1e-12)
    assert metric_value(REGRESSION, logits[:, 0], labels) == pytest.approx(0.8, abs=1e-12)


labels_of_three = st.lists(st.integers(0, 2), min_size=1, max_size=40)


@pytest.mark.parametrize("metric", ["accuracy", "f1", "matthews"])
@given(labels=labels_of_three)
def test_the_labels_themselves_as_outputs_are_perfect(metric: str, labels: list[int]) -> None:
    value = metric_value(classes(metric, 3), outputs(labels, 3), np.array(labels))
    one_class_only = len(set(labels)) == 1
    assert value == (0.0 if metric == "matthews" and one_class_only else pytest.approx(1.0))


@given(labels=labels_of_three, seed=st.integers(0, 999))
def test_a_metric_does_not_depend_on_the_order_of_the_rows(labels: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits, order = rng.normal(size=(len(labels), 3)), rng.permutation(len(labels))
    for metric in ("accuracy", "f1", "matthews"):
        task = classes(metric, 3)
        shuffled = metric_value(task, logits[order], np.array(labels)[order])
        assert shuffled == metric_value(task, logits, np.array(labels))


@given(
    values=st.lists(st.integers(-50, 50), min_size=2, max_size=30),
    scale=st.floats(0.1, 10),
    shift=st.floats(-100, 100),
)
def test_pearson_is_one_for_any_rising_line_and_minus_one_for_a_falling_one(
    values: list[int], scale: float, shift: float
) -> None:
    labels = np.array(values, dtype=np.float32)
    logits = scale * np.array(values, dtype=np.float64)[:, None] + shift
    expected = 0.0 if len(set(values)) == 1 else 1.0
    assert metric_value(REGRESSION, logits, labels) == pytest.approx(expected, abs=1e-6)
    assert metric_value(REGRESSION, -logits, labels) == pytest.approx(-expected, abs=1e-6)


@pytest.mark.parametrize("metric", ["f1", "matthews"])
def test_a_model_that_always_says_no_is_worth_zero_by_f1_and_matthews(metric: str) -> None:
    value = metric_value(classes(metric), outputs([0, 0, 0], 2), np.array([1, 0, 1]))
    assert value == 0.0


def test_a_constant_output_correlates_with_nothing() -> None:
    assert metric_value(REGRESSION, np.full((3, 1), 0.1), np.array([1.0, 2.0, 3.0])) == 0.0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_outputs_that_are_not_finite_have_no_quality(bad: float) -> None:
    assert math.isnan(metric_value(classes("accuracy"), np.array([[bad, 0.0]]), np.array([0])))
    logits = np.array([[bad], [1.0]])
    assert math.isnan(metric_value(REGRESSION, logits, np.array([1.0, 2.0])))


@pytest.mark.parametrize(
    ("shape", "num_labels"), [((0, 2), 0), ((3, 2), 2), ((2, 3), 2), ((2,), 2)]
)
def test_outputs_of_a_shape_that_does_not_fit_are_refused(
    shape: tuple[int, ...], num_labels: int
) -> None:
    with pytest.raises(ValueError, match=rf"^{num_labels} labels need outputs of shape"):
        metric_value(classes("accuracy"), np.zeros(shape), np.zeros(num_labels, dtype=np.int64))
