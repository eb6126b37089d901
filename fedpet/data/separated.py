"""Parse .csv and .tsv: every field is text, and every line of the file ends up in a row.

In:  the text of a file, its separator.
Out: columns of texts, None where a field is empty.

A file says nowhere whether its quotes quote. Two readings are tried: one where a quote is a
character like any other, and one where quotes hold a field together (RFC 4180, to the letter).
A .csv is read as quoted and a .tsv as unquoted, but for these:

    unquoted    the quotes do not add up, and each line has as many fields as the header
    quoted      a .tsv where a line has not, or whose header is quoted
    quoted      a .tsv with a field that needed quotes: it holds a quote or the end of a line

Where a quoted field of several lines holds a line that reads as a row of its own, a stray quote has
swallowed rows: the file is unquoted, or it is refused with the line.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from fedpet.data.column import Column, pack_rows

_LONGEST_FIELD = 2**31 - 1


@dataclass(frozen=True, slots=True)
class _Record:
    line: int  # its first, from 1
    num_lines: int
    fields: list[str]


def parse_separated(text: str, separator: str) -> dict[str, Column]:
    """Parse a file whose first line is its header.

    A row that is shorter than the header lacks its last fields; blank lines are no rows.

    Raises:
        ValueError: Quotes that do not add up, a row longer than the header, a column named twice,
            or no header. It names the line.
    """
    with _long_fields():
        return _parse(text, separator)


def _parse(text: str, separator: str) -> dict[str, Column]:
    records = iter(_choose_reading(text, separator))
    first = next(records, None)
    if first is None:
        raise ValueError("it is empty: the first line names the columns")
    header = first.fields
    for name in header:
        if name and header.count(name) > 1:
            raise ValueError(f"its first line names the column {name!r} twice: rename one")
    columns = pack_rows((_values(record, header, separator) for record in records), len(header))
    return dict(zip(header, columns, strict=True))


def _values(record: _Record, header: Sequence[str], separator: str) -> list[str | None]:
    if any(record.fields[len(header) :]):
        raise ValueError(
            f"line {record.line} has {len(record.fields)} fields, and the first line "
            f"{len(header)}. {separator!r} separates fields: quote a field that contains it"
        )
    found = [field or None for field in record.fields[: len(header)]]
    return found + [None] * (len(header) - len(found))


def _choose_reading(text: str, separator: str) -> Iterable[_Record]:
    if '"' not in text:
        return _records(text, separator, csv.QUOTE_NONE)
    plain = _read(text, separator, csv.QUOTE_NONE)
    even = all(len(record.fields) == len(plain[0].fields) for record in plain)
    try:
        quoted = _read(text, separator, csv.QUOTE_MINIMAL)
    except ValueError:
        if even:
            return plain
        raise
    swallowed = _find_swallowed(quoted, text, separator, doubtful=even and separator == "\t")
    if even and (swallowed or (separator == "\t" and not _needed_quotes(plain, quoted))):
        return plain
    if swallowed:
        raise ValueError(
            f"the quote that opens a field in line {swallowed.line} is closed in line "
            f"{swallowed.line + swallowed.num_lines - 1} only, and there are whole rows between. "
            "In a quoted field, write a quote twice"
        )
    return quoted


def _read(text: str, separator: str, quoting: Literal[0, 3]) -> list[_Record]:
    return list(_records(text, separator, quoting))


def _records(text: str, separator: str, quoting: Literal[0, 3]) -> Iterator[_Record]:
    line = 0
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=separator, quoting=quoting, strict=True
    )
    try:
        for fields in reader:
            if len(fields) > 1 or "".join(fields).strip():
                yield _Record(line + 1, reader.line_num - line, fields)
            line = reader.line_num
    except csv.Error:
        raise ValueError(
            f"the quotes in line {line + 1} do not add up: a field that begins with a quote must "
            "end with one, and a quote inside it is written twice"
        ) from None


@contextmanager
def _long_fields() -> Iterator[None]:
    """Let a field be as long as a text may be: the library's limit is 131,072 characters."""
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _needed_quotes(plain: Sequence[_Record], quoted: Sequence[_Record]) -> bool:
    """Test that lines have equal fields, quoted by a writer who quotes only where it must."""
    if len(plain) != len(quoted):
        return True  # a field holds the end of a line
    if all(a != b for a, b in zip(plain[0].fields, quoted[0].fields, strict=True)):
        return True
    return any(
        as_read != as_written and '"' in as_read
        for one, other in zip(plain, quoted, strict=True)
        for as_written, as_read in zip(one.fields, other.fields, strict=True)
    )


def _find_swallowed(
    records: Sequence[_Record], text: str, separator: str, *, doubtful: bool
) -> _Record | None:
    """Return the first record of several lines that holds what looks like a row of its own.

    Such a line has the header's fields, and values that other rows have in the same columns. Where
    no column has the same value twice, `doubtful` decides.
    """
    long = [record for record in records[1:] if record.num_lines > 1]
    if not long:
        return None
    width = len(records[0].fields)
    short = [r.fields for r in records[1:] if r.num_lines == 1 and len(r.fields) == width]
    seen = [{fields[column] for fields in short} - {""} for column in range(width)]
    # A column whose values never come again, such as an id, tells nothing.
    telling = [column for column in range(width) if len(seen[column]) < len(short)]
    lines = list(io.StringIO(text, newline=""))
    for record in long:
        inside = [i for i, field in enumerate(record.fields) if "\n" in field or "\r" in field]
        if not inside:
            continue
        own = lines[record.line - 1 : record.line - 1 + record.num_lines]
        for number, line in enumerate(own):
            fields = line.rstrip("\r\n").split(separator)
            # The first line has the record's own fields before the long one, the last those after.
            first = inside[-1] + 1 if number == 0 else 0
            last = inside[0] if number == len(own) - 1 else width
            told = [c for c in telling if first <= c < last and c not in inside]
            enough = bool(told) or (doubtful and not telling)
            if len(fields) == width and enough and all(fields[c] in seen[c] for c in told):
                return record
    return None
