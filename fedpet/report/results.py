"""Finds and reads what runs left, and refuses what this version cannot read.

In:  run folders, `result.json` files, cell files of a benchmark, or folders of any of these.
Out: the results as written, each with its path and its experiment's settings.
"""

from __future__ import annotations

import json
import logging
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedpet.config import Experiment
from fedpet.config.renamed import new_setting
from fedpet.errors import InputError
from fedpet.report.number_format import show_value

__all__ = ["read_results"]

SCHEMA = 1
# Keys that a reader of results relies on.
NEEDED: Mapping[str, tuple[str, ...]] = {
    "run": ("experiment", "method", "seed"),
    "model": ("communicated_values",),
    "quality": ("metric", "final"),
    "communication": (
        "uplink_bytes_per_client_round",
        "downlink_bytes_per_client_round",
        "total_bytes",
        "dense_fedavg_total_bytes",
    ),
}
# What may differ between runs of one row.
_FREE = ("run.",)

log = logging.getLogger(__name__)


def read_results(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Read the results that lie at `paths`.

    Args:
        paths: Run folders, result files, cell files (which hold a result under the key "result"),
            or folders to look for these in. A file reached twice counts once.

    Returns:
        The results as written, each with two keys more: "path", and "settings", the experiment's
        dotted keys and values so far as they are known.

    Raises:
        InputError: A path that is absent, holds no result, or one this version cannot read.
    """
    if not paths:
        raise InputError("there is nothing to compare: name run folders or result files.")
    found: dict[Path, dict[str, Any]] = {}
    for path in paths:
        if not path.exists():
            raise InputError(f"there is no run folder or result file {str(path)!r}.")
        given = list(_result_files(path)) if path.is_dir() else [(path, True)]
        results = {}
        for file, must in given:
            result = _read(file, must)
            if result is not None:
                results[file.resolve()] = result
        if not results:
            raise InputError(
                f"the folder {str(path)!r} holds no finished run: no result.json, and no other "
                'JSON file with a result under the key "result".'
            )
        found.update(results)
    return list(found.values())


def _result_files(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Candidates below a folder, and whether each must be a result. A run folder is one."""
    if (folder / "result.json").is_file():
        yield folder / "result.json", True
        return
    if (folder / "config.toml").is_file():
        log.warning("Left out: %s has not finished, it has no result.json.", folder)
        return
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            yield from _result_files(entry)
        elif entry.suffix == ".json" and not entry.name.startswith("."):
            yield entry, False


def _read(path: Path, must: bool) -> dict[str, Any] | None:
    """Read one file; None where it is no result and need not be one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} is not a readable JSON file: {error}.") from None
    cell = content if isinstance(content, dict) else {}
    result = cell.get("result", content)
    if not isinstance(result, dict) or not set(NEEDED) <= set(result):
        if must:
            raise InputError(
                f"{str(path)!r} is no result: it needs the keys {', '.join(NEEDED)}, at its top "
                'or under the key "result", as result.json of a run folder has them.'
            )
        return None
    if not isinstance(result.get("schema"), int) or result["schema"] > SCHEMA:
        raise InputError(
            f"this fedpet reads results of schema {SCHEMA}, {str(path)!r} has schema "
            f"{result.get('schema')!r}: read it with the fedpet that wrote it, or a newer one."
        )
    result = _with_nan(result)
    for part, names in NEEDED.items():
        for name in names:
            if not isinstance(result[part], dict) or result[part].get(name) is None:
                raise InputError(
                    f"the result {str(path)!r} lacks {part}.{name}: the run that wrote it did not "
                    "end, or wrote another format; run it again."
                )
    return {**result, "path": str(path), "settings": _settings(cell, path)}


def _with_nan(result: dict[str, Any]) -> dict[str, Any]:
    """The same, with NaN for the metric of a run that diverged: null in the file."""
    run, quality = result["run"], result["quality"]
    if not isinstance(run, dict) or run.get("status") != "diverged":
        return result
    if not isinstance(quality, dict) or "final" not in quality:
        return result
    numbers = {
        name: math.nan if quality.get(name) is None else quality[name] for name in ("final", "best")
    }
    return {**result, "quality": {**quality, **numbers}}


def _settings(cell: Mapping[str, Any], path: Path) -> dict[str, str]:
    """An experiment's dotted keys: from config.toml beside the result, or from the cell."""
    config = path.parent / "config.toml"
    tables: Mapping[str, Any] = cell
    if path.name == "result.json" and config.is_file():
        try:
            tables = tomllib.loads(config.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            raise InputError(f"{str(config)!r} is not a readable TOML file: {error}.") from None
    known = {f"{stage}.{key}" for stage, table in Experiment().to_tables().items() for key in table}
    found = {
        key: value
        for key, value in (new_setting(*setting) for setting in _dotted(tables))
        if key in known
    }
    return {key: show_value(found[key]) for key in sorted(found) if not key.startswith(_FREE)}


def _dotted(value: Any, parents: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """All `stage.key` with their values: of nested tables, and of "stage.key=value" strings."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if not (name == "result" and not parents):
                yield from _dotted(inner, (*parents, *str(name).replace("_", "-").split(".")))
        return
    if isinstance(value, list):
        for entry in value:
            if isinstance(entry, str) and "=" in entry:
                key, _, text = entry.partition("=")
                yield key.strip().replace("_", "-"), text.strip().strip("\"'")
    yield ".".join(parents[-2:]), value
