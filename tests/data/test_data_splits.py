"""Splits: found in each layout that data sets are written in, whole, and never twice."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, DatasetDict

from fedpet.data.open_source import open_source
from fedpet.data.split_table import Table
from fedpet.errors import DataError

ROWS: dict[str, list[dict[str, Any]]] = {
    "train": [{"text": f"w{i}", "label": ["no", "yes"][i % 2]} for i in range(6)],
    "test": [{"text": f"v{i}", "label": ["no", "yes"][i % 2]} for i in range(4)],
}


def texts(table: Table) -> list[str]:
    return table.column("text", "key", "where")


def jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def csv_of(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in rows))


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows).to_parquet(str(path))


def in_pieces(
    folder: Path, names: str, write: Callable[[Path, list[dict[str, Any]]], None]
) -> None:
    """Each split in two pieces: `names` has a place for the split and one for the number."""
    for split, rows in ROWS.items():
        half = len(rows) // 2
        for number, piece in enumerate((rows[:half], rows[half:])):
            write(folder / names.format(split=split, n=number), piece)


@pytest.mark.parametrize(
    ("names", "write"),
    [
        ("{split}/000{n}.parquet", parquet),
        ("{split}/anything {n}.jsonl", jsonl),
        ("{split}-0000{n}-of-00002.parquet", parquet),
        ("data/{split}-0000{n}-of-00002-b42a775f407cee45.parquet", parquet),
        ("data/{split}/b{n}.csv", csv_of),
        ("plain_text/{split}-0000{n}-of-00002.parquet", parquet),
        ("default/{split}/000{n}.parquet", parquet),
        ("{split}/part-0000{n}-c0ffee-c000.snappy.parquet", parquet),
        ("{split}.parquet/part-0000{n}-c0ffee-c000.snappy.parquet", parquet),
        ("{split}/part-0000{n}.json.gz", jsonl),
        ("{split}/part-0000{n}-c0ffee.csv", csv_of),
    ],
)
def test_a_split_is_found_in_its_layout_with_its_pieces_in_order(
    tmp_path: Path, names: str, write: Callable[[Path, list[dict[str, Any]]], None]
) -> None:
    in_pieces(tmp_path, names, write)
    for split in ROWS:  # what Spark and the hub leave beside
        for name in (names.format(split=split, n=0), "README.md"):
            place = (tmp_path / name).parent
            (place / "_SUCCESS").touch()
            (place / f".{Path(name).name}.crc").write_bytes(b"x")
    (tmp_path / "dataset_infos.json").write_text("{}")
    source = open_source(str(tmp_path))
    for split, rows in ROWS.items():
        assert texts(source.read(split)) == [row["text"] for row in rows]


def test_the_pieces_that_spark_writes_are_one_split_without_a_name(tmp_path: Path) -> None:
    for number in range(3):
        rows = ROWS["train"][2 * number : 2 * number + 2]
        csv_of(tmp_path / f"part-0000{number}-c0ffee-c000.csv", rows)
    csv_of(tmp_path / "part-00003-c0ffee-c000.csv", [])
    (tmp_path / "_SUCCESS").touch()
    table = open_source(str(tmp_path)).read("whichever")
    assert texts(table) == [row["text"] for row in ROWS["train"]]


@pytest.mark.parametrize("shards", [1, 3])
def test_what_a_dataset_saved_to_disk_is_read_as_one_split_with_its_classes(
    tmp_path: Path, shards: int
) -> None:
    classes = ClassLabel(names=["yes", "no"])
    dataset = Dataset.from_list(ROWS["train"]).cast_column("label", classes)
    dataset.save_to_disk(str(tmp_path / "saved"), num_shards=shards)
    sources = [tmp_path / "saved"]
    if shards == 1:
        sources.append(tmp_path / "saved" / "data-00000-of-00001.arrow")
    for source in sources:
        table = open_source(str(source)).read("train")
        assert texts(table) == [row["text"] for row in ROWS["train"]]
        assert table.label_names("label") == ("yes", "no")
        assert table.labels("label", "key", "where") == [r["label"] for r in ROWS["train"]]


def test_what_a_dict_of_datasets_saved_to_disk_has_its_splits(tmp_path: Path) -> None:
    saved = DatasetDict({split: Dataset.from_list(rows) for split, rows in ROWS.items()})
    saved.save_to_disk(str(tmp_path))
    source = open_source(str(tmp_path))
    for split, rows in ROWS.items():
        assert texts(source.read(split)) == [row["text"] for row in rows]
    with pytest.raises(DataError, match="has no split 'dev'"):
        source.check("dev")


def test_an_arrow_file_is_read_in_both_of_its_forms(tmp_path: Path) -> None:
    import pyarrow as pa

    table = pa.table({"text": ["w1", "w2"]})
    for form, name in ((pa.ipc.new_file, "a.arrow"), (pa.ipc.new_stream, "b.arrow")):
        with form(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
        assert texts(open_source(str(tmp_path / name)).read("")) == ["w1", "w2"]


@pytest.mark.parametrize("folder", ["", "data", "plain_text", "train"])
def test_a_piece_that_is_not_there_is_missed(tmp_path: Path, folder: str) -> None:
    for number in (0, 2):
        jsonl(tmp_path / folder / f"train-0000{number}-of-00003.jsonl", ROWS["train"])
    with pytest.raises(DataError, match="holds 2 of the 3 pieces of split 'train'"):
        open_source(str(tmp_path))


def test_pieces_of_two_writings_are_not_one_split(tmp_path: Path) -> None:
    for name in ("train-00000-of-00001-aaaaaaaa", "train-00000-of-00001-bbbbbbbb"):
        jsonl(tmp_path / "data" / f"{name}.jsonl", ROWS["train"])
    with pytest.raises(DataError, match="holds 2 of the 1 pieces of split 'train'"):
        open_source(str(tmp_path))


def test_a_saved_dataset_whose_file_is_lost_is_refused_with_its_name(tmp_path: Path) -> None:
    Dataset.from_list(ROWS["train"]).save_to_disk(str(tmp_path), num_shards=2)
    (tmp_path / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match=r"lacks 'data-00001-of-00002\.arrow', which its state"):
        open_source(str(tmp_path))
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read as what `save_to_disk` writes"):
        open_source(str(tmp_path))


def test_a_folder_of_two_configurations_is_refused_with_both(tmp_path: Path) -> None:
    for name in ("mrpc", "sst2"):
        jsonl(tmp_path / name / "train-00000-of-00001.jsonl", ROWS["train"])
    with pytest.raises(DataError, match="holds more than one data set, 'mrpc', 'sst2': name one"):
        open_source(str(tmp_path))


def test_files_of_two_formats_are_not_one_split(tmp_path: Path) -> None:
    jsonl(tmp_path / "train" / "a.jsonl", ROWS["train"])
    csv_of(tmp_path / "train" / "a.csv", ROWS["train"])
    with pytest.raises(DataError, match=r"more than once, as 'a\.csv', 'a\.jsonl': leave one"):
        open_source(str(tmp_path))


def test_split_files_go_before_folders_that_lie_beside_them(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", ROWS["train"])
    jsonl(tmp_path / "old" / "train.jsonl", ROWS["test"])
    jsonl(tmp_path / "test" / "0000.jsonl", ROWS["test"])
    source = open_source(str(tmp_path))
    for split, rows in ROWS.items():
        assert texts(source.read(split)) == [row["text"] for row in rows]
