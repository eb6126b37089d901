"""Labels: one name a class, however a label is written and whoever reads it."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from text_fixtures import write

from fedpet.config import ClientsConfig, DataConfig
from fedpet.data import FederatedData, load_data, load_evaluation
from fedpet.errors import ConfigError, DataError
from fedpet.tasks.class_labels import (
    check_label_names,
    encode_labels,
    name_of_label,
    read_off_label_names,
)

WHERE = "split 'train'"
ONE = ClientsConfig(partition="iid", num_clients=1, min_rows=1)


def csv_of(path: Path, labels: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("text,label\n" + "".join(f"w{i % 9},{one}\n" for i, one in enumerate(labels)))
    return path


def encode(labels: list[Any], names: tuple[str, ...]) -> list[int]:
    return [int(index) for index in encode_labels(labels, "classification", names, WHERE)]


def names_of(data: FederatedData, part: str) -> list[str]:
    return [data.task.label_names[index] for index in getattr(data, part).labels]


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ([1, 1.0, "1", "1.0", " 1", Decimal("1.00")], "1"),
        ([0, 0.0, -0.0, "0", "-0.0", "0."], "0"),
        ([True, "True", "true", "TRUE "], "True"),
        ([False, "False", "false"], "False"),
        (["01"], "01"),
        (["neg "], "neg "),
        (["1.10"], "1.10"),
        ([None, float("nan"), [1], b"1", {}], None),
    ],
)
def test_all_ways_to_write_a_value_are_one_name(written: list[Any], name: str | None) -> None:
    assert {name_of_label(one) for one in written if not isinstance(one, list | dict)} == {name}
    assert all(name_of_label(one) == name for one in written)


def test_a_word_in_one_split_does_not_shift_the_numbers_of_the_other(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    csv_of(tmp_path / "set" / "train.csv", [*["1", "2"] * 8, "unknown"])
    csv_of(tmp_path / "set" / "test.csv", ["2", "1", "2"])
    data = DataConfig(source=str(tmp_path / "set"))
    loaded = load_data(data, ONE, tokenizer_folder, cache=tmp_path / "cache")
    assert loaded.task.label_names == ("1", "2", "unknown")
    assert names_of(loaded, "train") == [*["1", "2"] * 8, "unknown"]
    assert names_of(loaded, "evaluation") == ["2", "1", "2"]


@pytest.mark.parametrize("labels", [["1", "2", "1"], ["3", "2", "3"], ["2.0", "1.0", "2.0"]])
def test_a_node_that_lacks_a_class_trains_the_classes_that_its_rows_name(
    tmp_path: Path, tokenizer_folder: Path, labels: list[str]
) -> None:
    plans = ("1", "2", "3")
    data = DataConfig(source=str(csv_of(tmp_path / "node.csv", labels)), label_names=plans)
    node = load_data(data, ONE, tokenizer_folder, cache=tmp_path, evaluation=False, all_rows=True)
    assert names_of(node, "train") == [str(int(float(label))) for label in labels]


def test_a_server_that_only_evaluates_names_the_same_classes(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    data = DataConfig(source=str(csv_of(tmp_path / "held.csv", ["3", "1", "2"])))
    server = load_evaluation(data, tokenizer_folder, cache=tmp_path)
    assert server.task.label_names == ("1", "2", "3")
    assert names_of(server, "evaluation") == ["3", "1", "2"]


@pytest.mark.parametrize("names", [("True", "False"), ("False", "True"), ("true", "false")])
def test_truth_values_go_by_their_names_and_never_by_their_places(names: tuple[str, ...]) -> None:
    places = [names.index(one) for one in names]
    assert encode([names[0] == names[0].capitalize(), names[1]], names)[1] == places[1]
    for label in (True, "True", "TRUE", 1, "1.0"):
        assert names[encode([label], names)[0]].lower() == "true"
    for label in (False, "false", 0, 0.0):
        assert names[encode([label], names)[0]].lower() == "false"


def test_truth_values_stand_for_1_and_0_where_those_are_the_names() -> None:
    assert encode([True, False, "true"], ("0", "1")) == [1, 0, 1]
    assert encode([True, False, 1], ("rotten", "fresh")) == [1, 0, 1]


@pytest.mark.parametrize("kind", [int, float, str, lambda n: f"{n}.0"])
def test_numbers_from_1_are_their_own_names_and_make_no_class_0(kind: Any) -> None:
    labels = [kind(n) for n in (1, 5, 2, 3, 4, 10)]
    names = read_off_label_names(labels, WHERE)
    assert names == ("1", "2", "3", "4", "5", "10")
    assert encode(labels, names) == [0, 4, 1, 2, 3, 5]
    assert encode(labels[:5], ("1", "2", "3", "4", "5")) == [0, 4, 1, 2, 3]


def test_a_number_that_is_no_name_among_names_that_are_numbers_is_refused() -> None:
    with pytest.raises(DataError, match=r"has the label 0\. Known are '1', '2': mend or remove"):
        encode([0], ("1", "2"))


@pytest.mark.parametrize("kind", [int, float, str])
def test_numbers_from_0_are_indices_in_whatever_type_they_come(kind: Any) -> None:
    names = read_off_label_names([kind(n) for n in (2, 0, 2)], WHERE)
    assert names == ("0", "1", "2")  # 1 may stand in the rows to evaluate on
    assert encode([kind(2), kind(1)], names) == [2, 1]


@pytest.mark.parametrize("label", ["-1", "0.5", "3.8", "-1.0", -1, 0.5])
def test_a_number_that_is_no_class_is_refused_as_text_as_well_unless_it_is_named(
    label: Any,
) -> None:
    with pytest.raises(DataError, match=r"^row 2 of .* whole number from 0: .*data\.label-names"):
        read_off_label_names([0, label, 1], WHERE)
    assert encode([label, 1], (str(label), "1")) == [0, 1]


@pytest.mark.parametrize("names", [("1", "1.0"), ("true", "True"), ("0", "-0")])
def test_names_that_are_one_value_written_twice_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="must be two or more different names"):
        check_label_names(DataConfig(label_names=names))
    with pytest.raises(DataError, match="two of these names are one value written in two ways"):
        read_off_label_names(["x"], WHERE, names)


def test_one_class_is_refused_where_the_source_names_it_as_well() -> None:
    with pytest.raises(DataError, match="name one class only"):
        read_off_label_names([0, 0], WHERE, ("spam",))


def test_a_regression_reads_the_same_values_from_csv_and_jsonl(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    csv_of(tmp_path / "a.csv", ["1", "2.5", "-3e1"])
    rows = [{"text": f"w{i}", "label": one} for i, one in enumerate([1, 2.5, -30.0])]
    write(tmp_path / "a.jsonl", rows)
    for name in ("a.csv", "a.jsonl"):
        data = DataConfig(
            source=str(tmp_path / name), task="regression", metric="pearson", eval_fraction=1e-9
        )
        loaded = load_data(data, ONE, tokenizer_folder, cache=tmp_path, evaluation=False)
        assert loaded.train.labels.tolist() == [1, 2.5, -30]
