"""Read a local file of any known format into a `Piece`.

In:  a path.
Out: its rows, with the types that the format tells: a .csv and a .tsv tell none.

Each value stands for itself: none is guessed to be a number, a date or missing by its neighbours.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import IO, Any

from fedpet.data.column import Column, ColumnBuilder
from fedpet.data.separated import parse_separated
from fedpet.data.split_table import Piece
from fedpet.utils.extras import check_extra

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")


def suffix_of(path: Path) -> str:
    """Return the suffix that tells the format, in lower case: ".csv" of "a.CSV.gz"."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def is_readable(path: Path) -> bool:
    return suffix_of(path) in _READERS


def readable() -> str:
    """List the formats, for messages."""
    return f"{', '.join(_READERS)}, as they are or with {', '.join(COMPRESSIONS)}"


def read_file(path: Path) -> Piece:
    """Read a file of a known format.

    Raises:
        Exception: Whatever the library of the format raises, or a ValueError with the line.
    """
    with path.open("rb") as file:
        start = file.peek(8)
        opened = next((o for magic, o in _DECOMPRESS.items() if start.startswith(magic)), None)
        if opened is None:
            return _READERS[suffix_of(path)](file)
        with opened(file) as content:
            return _READERS[suffix_of(path)](content)


def _open_zst(file: IO[bytes]) -> IO[bytes]:
    import zstandard

    reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
    return io.BufferedReader(reader)


# By what stands in the file; its name may say something else.
_DECOMPRESS: Mapping[bytes, Callable[[IO[bytes]], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
    b"\x28\xb5\x2f\xfd": _open_zst,
}
_MARK = b"\xef\xbb\xbf"  # of UTF-8, which some editors write


def _text(content: bytes, offset: int = 0) -> str:
    try:
        return content.removeprefix(_MARK if offset == 0 else b"").decode()
    except UnicodeDecodeError as error:
        error.start += offset
        error.end += offset
        raise ValueError(f"{error}. Save it as UTF-8") from None


def _read_csv(file: IO[bytes]) -> Piece:
    return Piece.of_columns(parse_separated(_text(file.read()), ","), typed=False)


def _read_tsv(file: IO[bytes]) -> Piece:
    return Piece.of_columns(parse_separated(_text(file.read()), "\t"), typed=False)


def _read_json(file: IO[bytes]) -> Piece:
    lines, head = _lines(file), []
    for line in lines:
        head.append(line)
        if line.strip():
            break
    builder, lines = ColumnBuilder(), chain(head, lines)
    for row in _array(lines) if head and head[-1].lstrip()[:1] == "[" else _objects(lines):
        builder.add(row)
    columns = builder.columns()
    return Piece(tuple(columns), builder.num_rows, columns.__getitem__)


def _lines(file: IO[bytes]) -> Iterator[str]:
    offset = 0
    for line in file:
        yield _text(line.removesuffix(b"\n"), offset)
        offset += len(line)


def _array(lines: Iterable[str]) -> list[dict[str, Any]]:
    try:
        rows = json.loads("\n".join(lines))
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno} is no JSON: {error.msg}") from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"entry {number} of its array is no object with the columns' names")
    return list(rows)


def _objects(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    count = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"line {number} is no JSON object ({error.msg}): write a row a line, or one array"
            ) from None
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is no JSON object with the columns' names")
        count += 1
        yield row
    if count == 1 and row and all(isinstance(v, dict | list) for v in row.values()):
        raise ValueError(
            "it holds one object of whole columns: write an object a row, one a line or all in one "
            "array"
        )


def _read_parquet(file: IO[bytes]) -> Piece:
    check_extra("pyarrow", "data", "a .parquet file")
    import pyarrow as pa
    import pyarrow.parquet as pq

    plain = isinstance(file, io.BufferedReader) and isinstance(file.raw, io.FileIO)
    table = pq.ParquetFile(str(file.name) if plain else pa.BufferReader(file.read()))
    schema = table.schema_arrow
    return Piece(
        tuple(schema.names),
        table.metadata.num_rows,
        lambda name: Column(table.read(columns=[name], use_threads=False).column(name)),
        _label_names(schema.metadata),
    )


def _read_arrow(file: IO[bytes]) -> Piece:
    check_extra("pyarrow", "data", "an .arrow file")
    import pyarrow as pa

    content = file.read()
    open_table = pa.ipc.open_file if content.startswith(b"ARROW1") else pa.ipc.open_stream
    with open_table(pa.py_buffer(content)) as reader:
        table = reader.read_all()
    return Piece(
        tuple(table.column_names),
        table.num_rows,
        lambda name: Column(table.column(name)),
        _label_names(table.schema.metadata),
    )


def _label_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, tuple[str, ...]]:
    """Read the class names that `datasets` wrote beside the columns."""
    told = json.loads((metadata or {}).get(b"huggingface", b"{}"))
    features = told.get("info", {}).get("features") or {}
    single = {column: _element(feature) for column, feature in features.items()}
    return {
        column: tuple(feature["names"])
        for column, feature in single.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    }


def _element(feature: Any) -> Any:
    """Return what a list is of; anything else as it is."""
    inner = feature.get("feature") if isinstance(feature, dict) else None
    return feature if inner is None else inner


_READERS: Mapping[str, Callable[[IO[bytes]], Piece]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
