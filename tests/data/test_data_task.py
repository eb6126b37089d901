"""Labels: the rule by which each kind is read, and the message for what breaks it."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpet.config import DataConfig
from fedpet.data import Task
from fedpet.errors import ConfigError, DataError
from fedpet.tasks.class_labels import check_label_names, encode_labels, read_off_label_names

WHERE = "split 'train'"


def test_a_task_has_an_output_for_each_class_and_one_for_a_regression() -> None:
    assert Task("classification", ("a", "b", "c"), "f1").num_outputs == 3
    assert Task("regression", (), "pearson").num_outputs == 1


@given(st.lists(st.text("abc é!", min_size=1, max_size=3), min_size=2, max_size=30))
def test_strings_are_looked_up_in_their_sorted_names(labels: list[str]) -> None:
    if len(set(labels)) < 2:
        labels = [*labels, labels[0] + "!"]
    names = read_off_label_names(labels, WHERE)
    assert list(names) == sorted(set(labels))
    encoded = encode_labels(labels, "classification", names, WHERE)
    assert encoded.dtype == np.int64
    assert [names[index] for index in encoded] == labels


@given(st.lists(st.integers(0, 6), min_size=7, max_size=30))
def test_whole_numbers_from_0_are_class_indices_up_to_the_largest(labels: list[int]) -> None:
    names = read_off_label_names([*labels, 0, 1], WHERE)
    assert names == tuple(str(i) for i in range(max([*labels, 1]) + 1))
    assert encode_labels(labels, "classification", names, WHERE).tolist() == labels


def test_whole_numbers_index_the_names_that_are_given() -> None:
    labels: list[Any] = [1, 0, "b", True, 1.0]
    assert encode_labels(labels, "classification", ("a", "b"), WHERE).tolist() == [1, 0, 1, 1, 1]


def test_regression_labels_are_kept_as_float32() -> None:
    encoded = encode_labels([1, 2.5, -3.0, "4.25"], "regression", (), WHERE)
    assert encoded.dtype == np.float32
    assert encoded.tolist() == [1.0, 2.5, -3.0, 4.25]


@pytest.mark.parametrize(
    ("label", "shown"), [("ham", "'ham'"), (2, "2"), (-1, "-1"), (None, "None"), (0.5, "0.5")]
)
def test_an_unknown_label_is_refused_with_its_row_and_the_known_ones(
    label: Any, shown: str
) -> None:
    with pytest.raises(
        DataError,
        match=rf"^row 3 of split 'train' has the label {re.escape(shown)}\. Known are 'no', 'yes', "
        r"or their indices 0 \.\.\. 1: mend or remove the row, or name all classes with "
        r"data\.label-names\.$",
    ):
        encode_labels(["no", 1, label], "classification", ("no", "yes"), WHERE)


def test_a_long_list_of_known_labels_is_cut_short() -> None:
    names = tuple(f"n{i}" for i in range(77))
    with pytest.raises(DataError, match=r"'n8', 'n9' and 67 more, or their indices 0 \.\.\. 76:"):
        encode_labels(["x"], "classification", names, WHERE)


@pytest.mark.parametrize("label", ["3,5", "nan", None, float("nan"), float("inf"), True])
def test_a_regression_label_that_is_no_finite_number_is_refused(label: Any) -> None:
    with pytest.raises(
        DataError,
        match=rf"^row 2 of split 'train' has the label {re.escape(repr(label))}\. A regression "
        r"label is a finite number: .*data\.task = 'classification'",
    ):
        encode_labels([1.0, label], "regression", (), WHERE)


@pytest.mark.parametrize("label", [3.8, -1, None, float("nan"), float("inf"), [1]])
def test_a_label_that_is_no_class_is_refused_when_names_are_read_off(label: Any) -> None:
    with pytest.raises(
        DataError,
        match=rf"^row 2 of split 'train' has the label {re.escape(repr(label))}\. A class is a "
        r"string or a whole number from 0: .*data\.task = 'regression'",
    ):
        read_off_label_names([0, label, 1], WHERE)


@pytest.mark.parametrize("labels", [["spam", "spam"], [0, 0, 0]])
def test_labels_of_one_class_only_are_refused(labels: list[Any]) -> None:
    with pytest.raises(DataError, match=r"name one class only, \['(spam|0)'\]: .*data.label-names"):
        read_off_label_names(labels, WHERE)


def test_a_number_that_would_make_more_classes_than_rows_is_refused() -> None:
    with pytest.raises(
        DataError, match="label 90210 of split 'train' is the index of class 90211, and there are 3"
    ):
        read_off_label_names([0, 90210, 1], WHERE)


def test_label_names_are_refused_for_a_regression() -> None:
    data = DataConfig(task="regression", metric="pearson", label_names=("a", "b"))
    with pytest.raises(ConfigError, match="belong to a classification: leave them out"):
        check_label_names(data)


@pytest.mark.parametrize("names", [("a",), ("a", "b", "a")])
def test_one_label_name_alone_or_twice_is_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"must be two or more different names, got \['a'"):
        check_label_names(DataConfig(label_names=names))
