"""Read everything that a page shows: a run's folder, and those it is compared with.

In:  a run folder, and runs, result files or cell files to compare it with.
Out: a `Report`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpet.config.renamed import with_new_names
from fedpet.errors import FedpetError, InputError
from fedpet.pet.structure import Structure
from fedpet.report.comparison import Row, compare_rows, group_runs
from fedpet.report.curves import read_curve, read_rounds
from fedpet.report.placement import Grid, Places, find_places
from fedpet.report.plots import Line
from fedpet.report.results import read_results
from fedpet.run.generations import read_generations
from fedpet.utils import bundled

__all__ = ["Report", "read_report"]


@dataclass(frozen=True)
class Report:
    """Everything that a page shows."""

    result: Mapping[str, Any]
    rounds: Sequence[Mapping[str, Any]] | None
    config: Mapping[str, Any]  # tables of config.toml; empty where there is none
    lines: Sequence[Line]
    rows: Sequence[Row]
    numbers: Mapping[tuple[str, str], int]  # of a group, by title and name: colour and marker
    places: Places
    structure: Structure | None  # of structure.json
    date: str  # the end of the run; "" in results of before
    checkpoint: str  # its name
    generations: Sequence[Mapping[str, str]] = ()  # of generations.json


def read_report(run: Path, compared: Sequence[Path] = ()) -> Report:
    """Read a run folder and what it is compared with.

    Raises:
        InputError: `run` is no finished run's folder, a compared path holds no result, or the
            runs are measured by different metrics.
    """
    if not (run / "result.json").is_file():
        raise InputError(
            f"{str(run)!r} is not the folder of a finished run: it has no result.json. Give the "
            "folder that `fedpet simulate` named at its end."
        )
    results = read_results([run, *compared])
    result = results[0]
    metric = result["quality"]["metric"]
    for other in results:
        if other["quality"]["metric"] != metric:
            raise InputError(
                f"a page shows one metric: {str(run)!r} was measured by {metric}, "
                f"{other['path']!r} by {other['quality']['metric']}."
            )
    groups = group_runs(results)
    several = len({group.title for group in groups}) > 1
    names = [f"{g.title}: {g.name}" if several else g.name for g in groups]
    mine = next(i for i, group in enumerate(groups) if any(r is result for r in group.runs))
    order = [mine, *(index for index in range(len(groups)) if index != mine)]
    numbers = {(groups[i].title, groups[i].name): number for number, i in enumerate(order)}
    lines = [
        Line(
            name=f"{name}, seed {one['run']['seed']}",
            group=name,
            number=numbers[group.title, group.name],
            curve=read_curve(one),
            main=one is result,
        )
        for group, name in zip(groups, names, strict=True)
        for one in group.runs
    ]
    return Report(
        result=result,
        rounds=read_rounds(result),
        config=_read_config(run / "config.toml"),
        lines=lines,
        rows=compare_rows(results),
        numbers=numbers,
        places=_places(run),
        structure=_structure(run),
        date=result["run"].get("date", ""),
        checkpoint=_checkpoint(result["run"]["backbone"]),
        generations=read_generations(run),
    )


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return with_new_names(tomllib.loads(path.read_text(encoding="utf-8-sig")))
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} is not a readable TOML file: {error}.") from None


def _checkpoint(model: str) -> str:
    """Return the name of a checkpoint; the bundled one has its package's."""
    if model in ("bundled", "embedded"):  # the latter in results of before
        return f"{bundled.name_of(bundled.MODEL)} (bundled)"
    return model


def _structure(run: Path) -> Structure | None:
    try:
        return Structure.from_json((run / "structure.json").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, FedpetError):
        return None  # a page without it is better than none


def _places(run: Path) -> Places:
    """Return where the run trained; a page without it is better than none."""
    if not (run / "plan.bin").is_file():
        return Places(None, Grid(), "the run has no plan")
    try:
        return find_places(run)
    except FedpetError as error:
        return Places(None, Grid(), str(error))
