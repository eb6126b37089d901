"""Find the split files of a folder, in the layouts that data sets are written in.

    train.jsonl, test.csv.gz                     a file a split, here or in the folder "data"
    train-00000-of-00002.parquet                 in pieces, all of which must be there
    train/0000.parquet, train/part-0000.csv      a folder a split, with files of any names
    plain_text/train-00000-of-00001.parquet      one folder, named after a configuration
    dataset_dict.json, state.json                what `datasets` saves to disk
    part-00000.parquet, 0000.parquet             pieces of one split without a name

In:  a folder.
Out: its files by split, in the order of their rows; the one split without a name is "".
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedpet.data.formats import is_readable, readable, suffix_of
from fedpet.errors import DataError

_DESCRIBING = ("meta", "metadata", "dataset_info", "dataset_infos", "dataset_dict", "state")
# train-00000-of-00002, and with the hash that the hub once added
_PIECE = re.compile(r"[-_](\d+)[-_]of[-_](\d+)(-[0-9a-f]{8,})?$")
# part-00000-c0ffee, 0000, data-00000-of-00001
_NAMELESS = re.compile(r"(part[-_]?\d+|0\d{3,}|data[-_]\d+[-_]of[-_]\d+)(?![0-9A-Za-z])")
_SPLIT = re.compile(r"train|training|test|testing|eval|evaluation|dev|val|valid|validation")

Splits = dict[str, list[Path]]


def find_splits(folder: Path) -> Splits:
    """Find a folder's files by split.

    Raises:
        DataError: There are none; a split is there twice, or some of its pieces are not.
    """
    splits = _saved(folder) or _loose(folder)
    if not splits:
        raise DataError(
            f"the folder {str(folder)!r} holds no split files. A split is a file such as "
            f"'train.jsonl' or 'test.csv.gz', or a folder 'train' of such files: {readable()}."
        )
    for split, paths in splits.items():
        _check_pieces(folder, split, paths)
    return splits


def _saved(folder: Path) -> Splits:
    """Find the files that `save_to_disk` of a Dataset or DatasetDict left; {} for none."""
    if (folder / "dataset_dict.json").is_file():
        names = _read(folder / "dataset_dict.json", "splits")
        return {name: _saved_pieces(folder / name) for name in names}
    pieces = _saved_pieces(folder) if (folder / "state.json").is_file() else []
    return {"": pieces} if pieces else {}


def _saved_pieces(folder: Path) -> list[Path]:
    named = _read(folder / "state.json", "_data_files")
    paths = [folder / one["filename"] for one in named]
    for path in paths:
        if not path.is_file():
            raise DataError(
                f"the folder {str(folder)!r} lacks {path.name!r}, which its state.json names: copy "
                "the folder again, with all its files."
            )
    return paths


def _read(path: Path, key: str) -> list[Any]:
    try:
        return list(json.loads(path.read_text(encoding="utf-8")).get(key, []))
    except (OSError, ValueError, AttributeError, TypeError):
        raise DataError(
            f"{str(path)!r} cannot be read as what `save_to_disk` writes: save the data again."
        ) from None


def _loose(folder: Path) -> Splits:
    """Files by their names, then folders: as splits, or as what holds the splits."""
    files = [path for place in (folder, folder / "data") for path in _files(place)]
    splits: Splits = {}
    for path in files:
        splits.setdefault(_split_of(path), []).append(path)
    if set(splits) == {""}:
        return splits
    splits.pop("", None)  # pieces of nothing, beside splits that have names
    inner = [path for place in (folder, folder / "data") for path in _folders(place)]
    holders = [path for path in inner if path != folder / "data" and _holds_splits(path)]
    if not splits and len(holders) == 1 and not any(map(_is_split, inner)):
        return find_splits(holders[0])
    if not splits and len(holders) > 1 and not any(map(_is_split, inner)):
        raise DataError(
            f"the folder {str(folder)!r} holds more than one data set, {_listed(holders)}: name "
            "one of these folders with data.source."
        )
    for path in inner:
        if path != folder / "data" and path not in holders:
            pieces = _saved(path).get("", []) or _files(path)
            if pieces:
                splits.setdefault(_stem(path), pieces)
    return splits


def _files(folder: Path) -> list[Path]:
    return [
        path
        for path in (sorted(folder.iterdir()) if folder.is_dir() else [])
        if path.is_file()
        and is_readable(path)
        and not path.name.startswith((".", "_"))
        and _stem(path) not in _DESCRIBING
    ]


def _folders(folder: Path) -> list[Path]:
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in inside if path.is_dir() and not path.name.startswith((".", "_"))]


def _stem(path: Path) -> str:
    """Return a name up to its format: "train" of "train.jsonl.gz" and of "train.parquet"."""
    return path.name[: path.name.lower().index(suffix_of(path))] if is_readable(path) else path.name


def _split_of(path: Path) -> str:
    """Return the split in a file's name, without a piece's number; "" for a number alone."""
    stem = _stem(path)
    return "" if _NAMELESS.match(stem) else _PIECE.sub("", stem)


def _is_split(folder: Path) -> bool:
    return bool(_SPLIT.fullmatch(_stem(folder).lower())) and bool(_files(folder))


def _holds_splits(folder: Path) -> bool:
    """Tell a configuration of a data set: a folder that is no split and has splits inside."""
    if _SPLIT.fullmatch(_stem(folder).lower()):
        return False
    if (folder / "dataset_dict.json").is_file():
        return True
    return any(_SPLIT.fullmatch(_split_of(path).lower()) for path in _files(folder)) or any(
        _is_split(path) for path in _folders(folder)
    )


def _check_pieces(folder: Path, split: str, paths: Sequence[Path]) -> None:
    """Refuse a split that is there twice, or not as a whole."""
    numbers = [_PIECE.search(_stem(path)) for path in paths]
    of = {match[2] for match in numbers if match}
    in_folder_of_its_own = paths[0].parent not in (folder, folder / "data") if paths else False
    alike = len({suffix_of(path) for path in paths}) <= 1
    if len(paths) > 1 and (not alike or not (all(numbers) or not split or in_folder_of_its_own)):
        raise DataError(
            f"the folder {str(folder)!r} holds the split {split!r} more than once, as "
            f"{_listed(paths)}: leave one."
        )
    told = {int(match[1]) for match in numbers if match}
    if of and (len(of) > 1 or not len(told) == len(paths) == int(*of)):
        raise DataError(
            f"the folder {str(folder)!r} holds {len(paths)} of the {max(map(int, of))} pieces of "
            f"split {split!r}, {_listed(paths)}: put all pieces of one writing there."
        )


def _listed(paths: Sequence[Path]) -> str:
    shown = ", ".join(repr(path.name) for path in paths[:10])
    return shown if len(paths) <= 10 else f"{shown} and {len(paths) - 10} more"
