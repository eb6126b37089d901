"""Separated files: every line ends up in a row, quoted or not, or is named in a refusal."""

from __future__ import annotations

import csv
import io
from typing import Any

import pandas as pd
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedpet.data.separated import parse_separated

HEADER = ("text", "label", "client")


def rows_of(text: str, separator: str) -> list[tuple[str | None, ...]]:
    columns = parse_separated(text, separator)
    assert tuple(columns) == HEADER
    return list(zip(*columns.values(), strict=True))


def plain(rows: list[tuple[str, ...]], separator: str) -> str:
    return "".join(separator.join(row) + "\n" for row in (HEADER, *rows))


def forty(texts: dict[int, str]) -> list[tuple[str, ...]]:
    return [(texts.get(i, f"a film {i}"), ["neg", "pos"][i % 2], f"c{i % 4}") for i in range(40)]


STRAY = {
    "two texts that begin with a quote": {6: '"so it goes', 18: '"again'},
    "one": {6: '"so it goes'},
    "one in the last row": {39: '"so it goes'},
    "one that ends in a quote": {6: '"so it goes"'},
    "one opened and closed rows later": {6: '"so it goes', 9: 'all of 5"'},
    "inside": {6: 'so "it" goes', 7: '5" and 6"'},
    "doubled": {6: '""so it goes', 7: '""'},
}


@pytest.mark.parametrize("separator", ["\t", ","])
@pytest.mark.parametrize("texts", [*STRAY.values()], ids=[*STRAY])
def test_a_stray_quote_swallows_no_row(texts: dict[int, str], separator: str) -> None:
    rows = forty(texts)
    read = rows_of(plain(rows, separator), separator)
    assert [row[1:] for row in read] == [row[1:] for row in rows]
    if separator == "\t":
        assert read == rows


@pytest.mark.parametrize("separator", ["\t", ","])
def test_a_stray_quote_in_a_file_that_quotes_is_refused_by_its_line(separator: str) -> None:
    rows = forty({6: '"so it goes', 9: 'all of 5"', 30: f'"one{separator} two"'})
    with pytest.raises(ValueError, match="in line 8 is closed in line 11 only, and there"):
        parse_separated(plain(rows, separator), separator)
    rows = forty({6: '"so it goes', 30: f'"one{separator} two"'})
    with pytest.raises(ValueError, match=r"^the quotes in line 8 do not add up: a field"):
        parse_separated(plain(rows, separator), separator)


@pytest.mark.parametrize("last", [False, True])
def test_a_swallowed_row_is_seen_where_the_text_is_the_last_column(last: bool) -> None:
    rows = forty({6: '"so it goes', 9: 'all of 5"', 30: '"one, two"'})
    turned = [tuple(reversed(row)) if last else row for row in rows]
    text = "".join(",".join(row) + "\n" for row in (HEADER, *turned))
    with pytest.raises(ValueError, match="in line 8 is closed in line 11 only"):
        parse_separated(text, ",")


def rows_with(characters: str) -> st.SearchStrategy[list[tuple[str, ...]]]:
    texts = st.text(characters, min_size=1, max_size=9).filter(str.strip)
    others = st.sampled_from(["neg", "pos"]), st.sampled_from(["c0", "c1"])
    return st.lists(st.tuples(texts, *others), min_size=1, max_size=6)


@given(
    rows=rows_with('ab "\t,\n\r é\u2028'),
    separator=st.sampled_from(["\t", ","]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
@example(rows=[('"', "neg", "c0")], separator="\t", quoting=csv.QUOTE_MINIMAL)
@example(rows=[("a\t\t\r", "neg", "c0")], separator="\t", quoting=csv.QUOTE_MINIMAL)
def test_what_a_library_has_quoted_comes_back_as_it_was(
    rows: list[tuple[str, ...]], separator: str, quoting: Any
) -> None:
    rows += [("a film", label, client) for label in ("neg", "pos") for client in ("c0", "c1")] * 2
    text = io.StringIO()
    csv.writer(text, delimiter=separator, quoting=quoting).writerows([HEADER, *rows])
    assert rows_of(text.getvalue(), separator) == rows


def test_what_pandas_writes_comes_back_as_it_was() -> None:
    rows = forty({3: "tab\there", 4: 'she said "no"', 5: "two\nlines", 6: "a, b"})
    for separator in ("\t", ","):
        text = pd.DataFrame(rows, columns=HEADER).to_csv(sep=separator, index=False)
        assert rows_of(text, separator) == rows


@given(rows=rows_with('ab " é'), separator=st.sampled_from(["\t", ","]))
def test_each_line_of_a_file_without_quoting_is_a_row(
    rows: list[tuple[str, ...]], separator: str
) -> None:
    rows += [("a film", label, client) for label in ("neg", "pos") for client in ("c0", "c1")] * 2
    read = rows_of(plain(rows, separator), separator)
    assert [row[1:] for row in read] == [row[1:] for row in rows]


def test_a_text_of_several_lines_is_no_swallowed_row() -> None:
    rows = forty({i: f"first, of {i}\nsecond, and\n\nlast" for i in (1, 2, 30)})
    text = io.StringIO()
    csv.writer(text).writerows([HEADER, *rows])
    assert rows_of(text.getvalue(), ",") == rows


def test_a_short_row_lacks_its_last_fields_and_a_long_one_is_refused() -> None:
    assert rows_of("text,label,client\nw1,0\nw2,1,c,,\n", ",") == [
        ("w1", "0", None),
        ("w2", "1", "c"),
    ]
    with pytest.raises(ValueError, match=r"^line 3 has 4 fields, and the first line 3\. ',' separ"):
        parse_separated("text,label,client\nw1,0,c\nw1, and,0,c\n", ",")


def test_a_text_longer_than_the_librarys_limit_is_read() -> None:
    limit = csv.field_size_limit()
    assert limit < 10**6
    with pytest.raises(ValueError, match="has 2 fields") as raised:
        parse_separated("text\nw1,w2\n", ",")
    assert csv.field_size_limit() == limit  # while what was raised is still looked at
    del raised
    long = "x" * (2 * limit)
    assert rows_of(f"text,label,client\n{long},0,c\n", ",") == [(long, "0", "c")]
    assert csv.field_size_limit() == limit


def test_blank_lines_are_no_rows_and_do_not_move_the_numbers_of_lines() -> None:
    assert rows_of("text,label,client\n\nw1,0,c\n  \n", ",") == [("w1", "0", "c")]
    with pytest.raises(ValueError, match=r"^line 4 has 4 fields"):
        parse_separated("text,label,client\n\n\nw1,0,c,d\n", ",")
