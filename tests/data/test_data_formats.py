"""Formats: the same rows are the same data, whatever file they come in and whatever it tells."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import fedpet.data.tokenize as load_module
from fedpet.config import ClientsConfig, DataConfig
from fedpet.data import FederatedData, count_clients, load_data
from fedpet.data.open_source import open_source
from fedpet.data.padding import Padding
from fedpet.errors import DataError

Row = dict[str, Any]
EVERYBODY = ClientsConfig(min_rows=1)
POOLS: dict[str, list[Any]] = {
    "int": [0, 1, 2],
    "int from 1": [1, 2, 3, 4, 5],
    "float": [0.0, 1.0, 2.0],
    "bool": [False, True],
    "string": ["neg", "pos", "neg ", 'é, "so"', "1", "01"],
    "category": ["neg", "pos", "None", "NA"],
}


@pytest.fixture(scope="module", autouse=True)
def no_tokens() -> Iterator[None]:
    """A row's tokens are its text's length: what is tested here stands before the tokeniser."""

    def lengths(texts: Any, *_: Any) -> tuple[dict[str, np.ndarray], Padding]:
        tokens = np.array([len(text) for text in texts[0]], dtype=np.int32)
        return {"tokens": tokens, "offsets": np.arange(len(tokens) + 1)}, Padding(0, left=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load_module, "tokenize_rows", lengths)
        yield


def frame(rows: list[Row], kind: str) -> pd.DataFrame:
    table = pd.DataFrame(rows)
    return table.astype({"label": "category"}) if kind == "category" else table


def separated(path: Path, rows: list[Row], separator: str) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=separator)
    writer.writeheader()
    writer.writerows(rows)
    path.write_text(text.getvalue(), encoding="utf-8", newline="")


def written_plainly(path: Path, rows: list[Row]) -> None:
    lines = ["\t".join(rows[0]), *("\t".join(str(v) for v in row.values()) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def saved(path: Path, rows: list[Row], kind: str) -> None:
    Dataset(pa.Table.from_pandas(frame(rows, kind))).save_to_disk(str(path))


def jsonl(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


WRITERS: dict[str, Callable[[Path, list[Row], str], object]] = {
    "a.jsonl": lambda path, rows, kind: jsonl(path, rows),
    "a.json": lambda path, rows, kind: path.write_text(json.dumps(rows)),
    "a.csv": lambda path, rows, kind: separated(path, rows, ","),
    "a.tsv": lambda path, rows, kind: separated(path, rows, "\t"),
    "plain.tsv": lambda path, rows, kind: written_plainly(path, rows),
    "a.parquet": lambda path, rows, kind: frame(rows, kind).to_parquet(path),
    "saved": saved,
}
texts = st.text('ab ",é', max_size=8).map(lambda text: f"w1 {text}")


@st.composite
def data_sets(draw: st.DrawFn) -> tuple[str, list[Row]]:
    kind = draw(st.sampled_from(sorted(POOLS)))
    pool = POOLS[kind]
    labels = draw(st.lists(st.sampled_from(pool), min_size=3, max_size=8))
    assume(len(set(labels)) > 1)
    ids = draw(st.sampled_from([["ann", "b b", "NA"], [0, 1, 12], ["01", "1", "001"]]))
    rows = [
        {"text": draw(texts), "label": label, "client": draw(st.sampled_from(ids))}
        for label in labels
    ]
    return kind, rows


def told(data: FederatedData, part: str = "train") -> tuple[Any, ...]:
    rows = getattr(data, part)
    return (
        data.task.label_names,
        rows.labels.tolist(),
        rows.tokens.tolist(),
        [(client.id, client.rows.tolist()) for client in data.clients],
        data.books[part],
    )


def name_of(label: Any) -> str:
    return (
        label if isinstance(label, str) else str(label if isinstance(label, bool) else int(label))
    )


def load(data: DataConfig, tokenizer: Path, home: Path, *, all_rows: bool = False) -> FederatedData:
    return load_data(
        data, EVERYBODY, tokenizer, cache=home / "cache", evaluation=False, all_rows=all_rows
    )


@settings(max_examples=25, deadline=None)  # each writes and reads some fourteen files
@given(drawn=data_sets(), node_rows=st.integers(1, 7))
def test_the_same_rows_give_the_same_data_in_every_format_on_server_and_node(
    drawn: tuple[str, list[Row]],
    node_rows: int,
    tokenizer_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    kind, rows = drawn
    home = tmp_path_factory.mktemp("set")
    server, node = {}, {}
    for name, write in WRITERS.items():
        # A line of a .tsv without quotes cannot hold what quotes hold together.
        if name == "plain.tsv" and any('"' in str(v) for row in rows for v in row.values()):
            continue
        write(home / name, rows, kind)
        data = DataConfig(source=str(home / name), eval_fraction=1e-9)
        server[name] = load(data, tokenizer_folder, home)
        (home / "node").mkdir(exist_ok=True)
        write(home / "node" / name, rows[:node_rows], kind)
        names = server[name].task.label_names
        own = replace(data, source=str(home / "node" / name), label_names=names)
        node[name] = load(own, tokenizer_folder, home, all_rows=True)
    for name in server:
        assert told(server[name]) == told(server["a.jsonl"]), name
        assert told(node[name]) == told(node["a.jsonl"]), name
    names = server["a.jsonl"].task.label_names
    assert [names[i] for i in server["a.jsonl"].train.labels] == [name_of(r["label"]) for r in rows]
    assert node["a.csv"].train.labels.tolist() == server["a.csv"].train.labels[:node_rows].tolist()


# What a format, or a library that guesses by the first rows, once made of a column.


def read(folder: Path, column: str) -> list[Any]:
    return open_source(str(folder)).read("train").column(column, "key", "where")


def test_an_id_that_is_no_number_after_ten_thousand_that_are_is_read_as_it_is_written(
    tmp_path: Path,
) -> None:
    ids = [*(str(i) for i in range(10_400)), "A12", "007"]
    separated(tmp_path / "train.csv", [{"text": "w1", "client": i} for i in ids], ",")
    assert read(tmp_path, "client") == ids


def test_a_column_that_nobody_asks_for_stops_nothing(tmp_path: Path) -> None:
    long = "x" * 500
    rows = [{"text": long, "label": 1, "note": None if i < 21_000 else "n"} for i in range(21_500)]
    jsonl(tmp_path / "train.jsonl", rows)  # more than the 10 MB by which a reader once guessed
    assert len(read(tmp_path, "label")) == 21_500
    nested = pa.table({"label": [1, 2], "strange": [[{"a": 1}], None]})
    (tmp_path / "train.jsonl").unlink()
    pq.write_table(nested, tmp_path / "train.parquet")
    assert read(tmp_path, "label") == [1, 2]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv"])
def test_pieces_whose_types_differ_are_one_column(
    tmp_path: Path, tokenizer_folder: Path, suffix: str
) -> None:
    for i, ids in enumerate(([1, 2], ["A12", "2"], [1.0, 2.0])):
        rows = [{"text": "w1", "label": f"l{n}", "client": one} for n, one in enumerate(ids)]
        path = tmp_path / f"train-0000{i}-of-00003.{suffix}"
        WRITERS[f"a.{suffix}"](path, rows, "string")
    data = DataConfig(source=str(tmp_path), eval_split="", eval_fraction=1e-9)
    loaded = load(data, tokenizer_folder, tmp_path)
    expected = {"1": [0, 4], "2": [1, 3, 5], "A12": [2]}
    if suffix == "csv":  # in which an id is what is written
        expected = {"1": [0], "1.0": [4], "2": [1, 3], "2.0": [5], "A12": [2]}
    assert {client.id: client.rows.tolist() for client in loaded.clients} == expected


def test_a_date_in_a_text_column_stays_the_text_it_is(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", [{"client": "2024-01-02"}, {"client": "2024-01-03T10:00:00Z"}])
    assert read(tmp_path, "client") == ["2024-01-02", "2024-01-03T10:00:00Z"]


@pytest.mark.parametrize(
    ("values", "ids"),
    [([0.0, 1.0, 2.5], ["0", "1", "2.5"]), (["01", "1", " 1"], [" 1", "01", "1"])],
)
def test_a_client_goes_by_its_id_as_it_is_written_and_by_a_whole_number_without_a_point(
    tmp_path: Path, tokenizer_folder: Path, values: list[Any], ids: list[str]
) -> None:
    rows = [{"text": "w1", "label": f"l{i}", "client": one} for i, one in enumerate(values)]
    jsonl(tmp_path / "all.jsonl", rows)
    data = DataConfig(source=str(tmp_path / "all.jsonl"), eval_fraction=1e-9)
    assert [client.id for client in load(data, tokenizer_folder, tmp_path).clients] == ids


def test_an_id_that_is_not_a_number_but_nan_is_missing(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    rows = pd.DataFrame({"text": ["w1", "w2"], "label": ["a", "b"], "client": [1.0, float("nan")]})
    rows.to_parquet(tmp_path / "all.parquet")
    data = DataConfig(source=str(tmp_path / "all.parquet"), eval_fraction=1e-9)
    with pytest.raises(
        DataError, match=r"^row 2 of the file .* names no client in column 'client'"
    ):
        load(data, tokenizer_folder, tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.json", '{"text": ["w1", "w2"], "label": [0, 1]}', "one object of whole columns: write"),
        ("a.json", "[1, 2]", "entry 1 of its array is no object"),
        ("a.jsonl", '{"text": "w1"}\n["w2"]\n', "line 2 is no JSON object with the columns'"),
        ("a.csv", "text;label\nw1, and;0\n", "line 2 has 2 fields, and the first line 1. ','"),
        ("a.csv", "text,label,text\nw1,0,w1\n", "names the column 'text' twice: rename one"),
        ("a.csv", "text,label\nw1 caf\udce9,0\n", "Save it as UTF-8"),
    ],
)
def test_a_file_of_another_shape_is_refused_in_one_short_sentence(
    tmp_path: Path, name: str, content: str, why: str
) -> None:
    (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=re.escape(why)) as refused:
        open_source(str(tmp_path / name)).read("")
    assert len(str(refused.value).replace(str(tmp_path), "")) < 200


def test_half_a_surrogate_pair_and_a_column_of_numbers_are_no_texts(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    jsonl(tmp_path / "a.jsonl", [{"text": "w1", "label": 0}, {"text": "w \ud800", "label": 1}])
    (tmp_path / "b.csv").write_text("text,label\n1,0\n2.5,1\n")
    for name, why in (("a.jsonl", "row 2 .* is no Unicode"), ("b.csv", "row 1 .* every row a num")):
        data = DataConfig(source=str(tmp_path / name), eval_fraction=1e-9)
        with pytest.raises(DataError, match=why):
            load(data, tokenizer_folder, tmp_path)


def test_a_missing_text_is_refused_by_its_row_where_clients_are_only_counted(
    tmp_path: Path,
) -> None:
    (tmp_path / "a.csv").write_text("text,label,client\nw1,0,c\n,1,c\n")
    data = DataConfig(source=str(tmp_path / "a.csv"))
    with pytest.raises(DataError, match=r"^row 2 of the file .* has None in column 'text'"):
        count_clients(data, EVERYBODY, cache=tmp_path / "cache")
