"""Recommend a codec from the cells of codecs.toml and codecs_dirichlet.toml.

The rule: a codec keeps the accuracy where its mean loss and one standard error of it are
at most `MOST_LOST`, in every table. Of those, the one that sends the smallest part of dense FedAvg.
The default may be another that sends less still and whose mean loss alone keeps the bound: that is
said beside the rule's choice.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpet.report.number_format import show_ratio

TABLES = {"codecs": "films", "codecs_dirichlet": "intents, Dirichlet 0.1"}
LOSSLESS = "float32"
DEFAULT = "dither-3-5-values"
MOST_LOST = 0.005  # of accuracy


@dataclass(frozen=True)
class CodecRow:
    """Hold a codec's figures over the seeds."""

    accuracy: float
    lost: float  # against the lossless codec, seed by seed
    error: float  # standard error of `lost`
    ratio: float  # of dense FedAvg's bytes


def codec_rows(folder: Path) -> dict[str, CodecRow]:
    """Return rows by codec, of codecs with all the seeds of the lossless one."""
    cells: dict[str, dict[int, dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        cell = json.loads(path.read_text(encoding="utf-8"))
        cells.setdefault(cell["method"], {})[cell["settings"]["run"]["seed"]] = cell["result"]
    lossless = {seed: result["quality"]["final"] for seed, result in cells[LOSSLESS].items()}
    rows = {}
    for codec, results in cells.items():
        if results.keys() != lossless.keys():  # not all of it has been run
            continue
        lost = [lossless[seed] - result["quality"]["final"] for seed, result in results.items()]
        rows[codec] = CodecRow(
            statistics.mean(result["quality"]["final"] for result in results.values()),
            statistics.mean(lost),
            statistics.stdev(lost) / len(lost) ** 0.5,
            statistics.mean(r["communication"]["ratio_to_dense"] for r in results.values()),
        )
    return rows


def recommended(tables: Sequence[Mapping[str, CodecRow]]) -> str:
    """Choose the codec of the fewest bytes that loses next to nothing in any table."""
    keeping = [
        codec
        for codec in tables[0]
        if all(
            codec in rows and rows[codec].lost + rows[codec].error <= MOST_LOST for rows in tables
        )
    ]
    return min(keeping, key=lambda codec: sum(rows[codec].ratio for rows in tables))


def default_stands(tables: Sequence[Mapping[str, CodecRow]]) -> bool:
    """Tell whether the default is recommended, or sends less and loses little on the mean."""
    best = recommended(tables)
    sent = {codec: sum(rows[codec].ratio for rows in tables) for codec in (best, DEFAULT)}
    little = all(rows[DEFAULT].lost <= MOST_LOST for rows in tables)
    return best == DEFAULT or (little and sent[DEFAULT] < sent[best])


def as_text(tables: Mapping[str, Mapping[str, CodecRow]]) -> tuple[str, str]:
    """Return both tables side by side, by bytes, and a paragraph on the choice.

    Args:
        tables: Name of a table -> its rows.
    """
    heads = [f"{name}: accuracy | lost, points | of dense FedAvg" for name in tables]
    lines = ["| codec | " + " | ".join(heads) + " |", "|---|" + "---:|" * 3 * len(heads)]
    first = next(iter(tables.values()))
    for codec in sorted(first, key=lambda codec: -first[codec].ratio):
        cells = []
        for rows in tables.values():
            row = rows.get(codec)
            if row is None:
                cells += ["–"] * 3
                continue
            lost = f"{100 * row.lost:.2f} ± {100 * row.error:.2f}" if codec != LOSSLESS else ""
            cells += [f"{row.accuracy:.4f}", lost, show_ratio(row.ratio)]
        lines.append(f"| {codec} | " + " | ".join(cells) + " |")
    every = list(tables.values())
    best = recommended(every)
    rule = (
        "Lost is the mean over the seeds of what the same seed reaches without loss, ± that mean's "
        "standard error. Of the codecs that lose, one standard error added, at most "
        f"{100 * MOST_LOST:g} points on both, **{best}** sends the "
        "smallest part of dense FedAvg, both added."
    )
    if best != DEFAULT and all(DEFAULT in rows for rows in every):
        less = 1 - sum(rows[DEFAULT].ratio / rows[best].ratio for rows in every) / len(every)
        most = max(rows[DEFAULT].lost + rows[DEFAULT].error for rows in every)
        rule += (
            f" The default is {DEFAULT} all the same: it sends {less:.1%} less, and with "
            f"{100 * most:.2f} points misses the bound by less than three seeds can tell; it is "
            "unbiased for every vector, and the server rotates back once a round."
        )
    return "\n".join(lines), rule
