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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedpet.data.separated import parse_separated
from fedpet.data.split_table import Piece

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
    return _READERS[suffix_of(path)](_decompressed(path.read_bytes()))


def _decompressed(content: bytes) -> bytes:
    """Go by what stands in the file; its name may say something else."""
    for magic, decompress in _DECOMPRESS.items():
        if content.startswith(magic):
            return decompress(content)
    return content


def _decompress_zst(content: bytes) -> bytes:
    import zstandard

    decompressor = zstandard.ZstdDecompressor()
    return decompressor.stream_reader(io.BytesIO(content), read_across_frames=True).read()


_DECOMPRESS: Mapping[bytes, Callable[[bytes], bytes]] = {
    b"\x1f\x8b": gzip.decompress,
    b"BZh": bz2.decompress,
    b"\xfd7zXZ\x00": lzma.decompress,
    b"\x28\xb5\x2f\xfd": _decompress_zst,
}


def _text(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{error}. Save it as UTF-8") from None


def _read_csv(content: bytes) -> Piece:
    return Piece.of_columns(parse_separated(_text(content), ","), typed=False)


def _read_tsv(content: bytes) -> Piece:
    return Piece.of_columns(parse_separated(_text(content), "\t"), typed=False)


def _read_json(content: bytes) -> Piece:
    text = _text(content)
    rows = _array(text) if text.lstrip()[:1] == "[" else _lines(text)
    names = tuple(dict.fromkeys(name for row in rows for name in row))
    return Piece(names, len(rows), lambda name: [row.get(name) for row in rows])


def _array(text: str) -> list[dict[str, Any]]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno} is no JSON: {error.msg}") from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"entry {number} of its array is no object with the columns' names")
    return list(rows)


def _lines(text: str) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
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
        rows.append(row)
    if len(rows) == 1 and rows[0] and all(isinstance(v, dict | list) for v in rows[0].values()):
        raise ValueError(
            "it holds one object of whole columns: write an object a row, one a line or all in one "
            "array"
        )
    return rows


def _read_parquet(content: bytes) -> Piece:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = pq.ParquetFile(pa.BufferReader(content))
    schema = file.schema_arrow
    return Piece(
        tuple(schema.names),
        file.metadata.num_rows,
        lambda name: _values(file.read(columns=[name]), name),
        _label_names(schema.metadata),
    )


def _read_arrow(content: bytes) -> Piece:
    import pyarrow as pa

    buffer = pa.py_buffer(content)
    as_file = content.startswith(b"ARROW1")
    with (pa.ipc.open_file if as_file else pa.ipc.open_stream)(buffer) as reader:
        table = reader.read_all()
    return Piece(
        tuple(table.column_names),
        table.num_rows,
        lambda name: _values(table, name),
        _label_names(table.schema.metadata),
    )


def _values(table: Any, name: str) -> list[Any]:
    values: list[Any] = table.column(name).to_pylist()
    return values


def _label_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, tuple[str, ...]]:
    """Read the class names that `datasets` wrote beside the columns."""
    told = json.loads((metadata or {}).get(b"huggingface", b"{}"))
    features = told.get("info", {}).get("features") or {}
    return {
        column: tuple(feature["names"])
        for column, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    }


_READERS: Mapping[str, Callable[[bytes], Piece]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
