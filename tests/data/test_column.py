"""Columns hold what they were given: every value and its type, in Arrow arrays or as objects."""

from __future__ import annotations

import datetime
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpet.data import column as column_module
from fedpet.data.array_spool import ArraySpool, save_array
from fedpet.data.column import Column, ColumnBuilder, Selection, distinct_values, pack_rows
from fedpet.data.formats import read_file

KINDS = [
    st.text(max_size=3),
    st.integers(-(2**70), 2**70) | st.integers(-3, 3),
    st.floats(allow_nan=False),
    st.booleans(),
    st.just([1]),
    st.just("\ud800"),
]
values = st.one_of(
    *(st.lists(st.none() | kind, max_size=20) for kind in KINDS),
    st.lists(st.one_of(st.none(), *KINDS), max_size=20),
)


def pack(rows: list[Any]) -> Column:
    [column] = pack_rows(([value] for value in rows), 1)
    return column


def typed(rows: Any) -> list[tuple[type, Any]]:
    return [(type(value), value) for value in rows]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(column_module, "BATCH_ROWS", 3)


@given(rows=values, data=st.data())
def test_a_column_gives_back_every_value_with_its_type(rows: list[Any], data: Any) -> None:
    packed = pack(rows)
    assert typed(packed) == typed(rows)
    assert typed(packed[i] for i in range(len(rows))) == typed(rows)
    assert typed(packed[1:5]) == typed(rows[1:5])
    cut = data.draw(st.integers(0, len(rows)))
    assert typed(Column.joined([pack(rows[:cut]), pack(rows[cut:])])) == typed(rows)


@given(rows=values, data=st.data())
def test_some_rows_of_a_column_are_those_rows(rows: list[Any], data: Any) -> None:
    numbers = [i for i in range(len(rows)) if data.draw(st.booleans())]
    for column in (Column(rows), pack(rows)):
        some = Selection(column, np.array(numbers, dtype=np.int64))
        assert typed(some) == typed(rows[i] for i in numbers)
        for start in (0, 2):
            taken = some[start : start + 4]
            listed = taken if isinstance(taken, list) else taken.to_pylist()
            assert typed(listed) == typed(rows[i] for i in numbers[start : start + 4])


@given(rows=values)
def test_a_rows_distinct_value_is_its_own_and_types_are_told_apart(rows: list[Any]) -> None:
    for column in (rows, Column(rows), pack(rows)):
        found, codes = distinct_values(column)
        assert codes.dtype == np.int32
        assert typed(found[code] for code in codes) == typed(rows)
        plain = [one for one in typed(found) if one[0] is not list]
        assert len(plain) == len(set(plain))


def test_values_of_no_plain_type_stay_objects() -> None:
    day = datetime.date(2026, 1, 2)
    for rows in ([day, None], [{"a": 1}], [1, 1.0], [True, 1], [None, None]):
        assert pack(rows).arrow is None
        assert typed(pack(rows)) == typed(rows)
    assert Column(pa.chunked_array([pa.array([day])])).arrow is None
    found, codes = distinct_values([math.nan, 1.0])
    assert (len(found), codes.tolist()) == (2, [0, 1])


@given(
    rows=st.lists(
        st.dictionaries(
            st.sampled_from("abc"), st.none() | st.integers(0, 2) | st.text(max_size=2)
        ),
        max_size=12,
    )
)
def test_rows_as_dictionaries_make_the_columns_that_they_name(rows: list[dict[str, Any]]) -> None:
    builder = ColumnBuilder()
    for row in rows:
        builder.add(row)
    columns = builder.columns()
    assert list(columns) == list(dict.fromkeys(name for row in rows for name in row))
    assert builder.num_rows == len(rows)
    for name, column in columns.items():
        assert typed(column) == typed(row.get(name) for row in rows)


@pytest.mark.parametrize("form", ["lines", "array", "blank lines before"])
def test_json_rows_are_read_without_a_guess_at_their_types(tmp_path: Path, form: str) -> None:
    rows: list[dict[str, Any]] = [
        {"text": "2026-01-02", "label": 1}, {"text": "12", "label": 1.0, "more": [1]},
        {"text": "é\ud800", "label": "1"}, {"label": True}, {"text": None, "label": 2**65},
    ]  # fmt: skip
    lines = [json.dumps(row) for row in rows]
    text = f"[{','.join(lines)}]" if form == "array" else "\r\n".join(lines)
    path = tmp_path / "a.jsonl"
    path.write_text(f"\n \n{text}" if "blank" in form else f"\ufeff{text}", encoding="utf-8")
    piece = read_file(path)
    assert piece.num_rows == len(rows)
    assert piece.column_names == ("text", "label", "more")
    for name in piece.column_names:
        assert typed(piece.read(name)) == typed(row.get(name) for row in rows)


def test_a_byte_that_is_no_utf8_is_named_by_its_place_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": "\xff"}\n')
    with pytest.raises(ValueError, match=r"in position 16.*Save it as UTF-8"):
        read_file(path)


@pytest.mark.parametrize("count", [0, 5, 300_000])  # in memory, and beyond it
def test_an_array_that_grew_piece_by_piece_is_saved_as_numpy_saves_it(
    tmp_path: Path, count: int
) -> None:
    whole = np.arange(count, dtype=np.int32)
    spool = ArraySpool(np.int32, tmp_path)
    for start in range(0, count, 70_000):
        spool.append(whole[start : start + 70_000].astype(np.int64))
    np.testing.assert_array_equal(spool.array(), whole)
    save_array(tmp_path / "spool.npy", spool)
    save_array(tmp_path / "numpy.npy", whole)
    assert (tmp_path / "spool.npy").read_bytes() == (tmp_path / "numpy.npy").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"spool.npy", "numpy.npy"}
