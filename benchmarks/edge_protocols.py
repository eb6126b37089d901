"""Compare runs by the three protocols of EdgeFlowerTune, from what their folders hold.

    python -m benchmarks.edge_protocols RUN ... [--budget 1e6 ...] [--target 12.5 ...] [--out FILE]

    quality under a budget     the metric of the last evaluation before the bytes are spent
    bytes to a target          what had been sent when an evaluation first reached the metric
    robustness to drop-outs    the metric where clients did not answer, beside that of a run of
                               the same settings in which all did

Read are `config.toml` and `rounds.jsonl` of each run folder, so a run that goes on can be compared
too; with --out what was read is written to a JSON file. Bytes are those of all clients and rounds,
both ways, the plan included. EdgeFlowerTune also measures energy, latency and memory on its
devices, which no run folder tells of.

Source: EdgeFlowerTune (arXiv:2605.08636), whose protocols these are; code and budgets are ours.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.stored_settings import stored_experiment
from fedpet.errors import InputError
from fedpet.report.number_format import show_metric, show_percent
from fedpet.training.metrics import greater_is_better
from fedpet.utils.atomic_write import atomic_write
from fedpet.utils.formatting import format_bytes

__all__ = ["EdgeRun", "as_text"]

SHARES = (0.5, 0.8, 0.95)  # of the largest gain: targets where none is named
BUDGETS_PER_DECADE = (1, 3)


@dataclass(frozen=True)
class EdgeRun:
    """Hold what the evaluations and rounds of one run came to.

    Attributes:
        name: Of the folder.
        metric: The one that decides.
        points: Of each evaluation: the round, bytes until then, the metric.
        asked: Clients asked over all rounds.
        answered: Updates that were used.
        averaged: Rounds that came to an average, and all rounds: a pair.
        settings: The experiment but for names, folders and workers.
    """

    name: str
    metric: str
    points: tuple[tuple[int, int, float], ...]
    asked: int
    answered: int
    averaged: tuple[int, int]
    settings: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> EdgeRun:
        """Read a run folder.

        Raises:
            InputError: It holds no run, or one that never evaluated.
        """
        try:
            lines = (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
            rounds = [json.loads(line) for line in lines]
            stored = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"{str(folder)!r} is no run folder that can be read: {error}."
            ) from None
        points, spent = [], 0
        for line in rounds:
            spent += line["uplink_bytes"] + line["downlink_bytes"] + line["plan_bytes"]
            if line.get("metric") is not None or line["evaluation_seconds"]:
                value = math.nan if line["metric"] is None else float(line["metric"])
                points.append((line["round"], spent, value))
        if not points:
            raise InputError(f"the run {str(folder)!r} has no evaluation to compare.")
        trained = [line for line in rounds if line["clients"] and "kind" not in line]
        settings = stored_experiment(stored).to_tables()  # keys of later have their default
        del settings["run"]
        return cls(
            name=folder.name,
            metric=settings["data"]["metric"],
            points=tuple(points),
            asked=sum(line["clients"] for line in trained),
            answered=sum(line["replies"] for line in trained),
            averaged=(sum(bool(line["aggregated"]) for line in trained), len(trained)),
            settings=settings,
        )

    @property
    def spent(self) -> int:
        return self.points[-1][1]

    @property
    def final(self) -> float:
        return self.points[-1][2]

    @property
    def lost(self) -> float:
        """Return the fraction of clients that were asked and whose update was not used."""
        return 1.0 - self.answered / max(self.asked, 1)

    def under(self, budget: float) -> float | None:
        """Return the metric when a budget of bytes is spent; None if no evaluation came before."""
        within = [value for _, spent, value in self.points if spent <= budget]
        return within[-1] if within else None

    def bytes_to(self, target: float) -> int | None:
        """Return the bytes until an evaluation reached a metric; None if none did."""
        sign = 1 if greater_is_better(self.metric) else -1
        reached = (spent for _, spent, value in self.points if sign * (value - target) >= 0)
        return next(reached, None)


def as_text(
    runs: Sequence[EdgeRun], budgets: Sequence[float] = (), targets: Sequence[float] = ()
) -> str:
    """Return the three tables in Markdown; that of drop-outs where there were any.

    Args:
        runs: One or more, of one metric.
        budgets: In bytes; () takes a few up to the largest run's.
        targets: Of the metric; () takes shares of the largest gain over the first run's start.

    Raises:
        InputError: The runs have several metrics, or there are none.
    """
    if len({run.metric for run in runs}) != 1:
        named = ", ".join(sorted({run.metric for run in runs})) or "none"
        raise InputError(f"runs are compared by one metric, and these have {named}.")
    budgets = budgets or _budgets(runs)
    targets = targets or _targets(runs)
    metric = runs[0].metric
    parts = [
        f"Quality under a budget ({metric})",
        _table(
            [f"within {format_bytes(budget)}" for budget in budgets],
            {run.name: [_shown(run.under(budget)) for budget in budgets] for run in runs},
        ),
        f"Bytes to a target ({metric})",
        _table(
            [f"to {show_metric(target)}" for target in targets],
            {run.name: [_size(run.bytes_to(target)) for target in targets] for run in runs},
        ),
    ]
    if any(run.lost for run in runs):
        heads = ["clients lost", "rounds averaged", metric, "without drop-outs", "bytes"]
        rows = {run.name: _robustness(run, runs) for run in runs}
        parts += ["Robustness to drop-outs", _table(heads, rows)]
    return "\n\n".join(parts)


def _robustness(run: EdgeRun, runs: Sequence[EdgeRun]) -> list[str]:
    whole = [one for one in runs if one.settings == run.settings and not one.lost]
    return [
        show_percent(run.lost),
        f"{run.averaged[0]} of {run.averaged[1]}",
        show_metric(run.final),
        _shown(whole[0].final if whole else None),
        format_bytes(run.spent),
    ]


def _budgets(runs: Sequence[EdgeRun]) -> list[float]:
    """Take 1 and 3 of each power of ten from the first evaluation paid for to the largest total."""
    paid = [spent for run in runs for _, spent, _ in run.points if spent]
    if not paid:
        return [1.0]
    first, last = math.floor(math.log10(min(paid))), math.ceil(math.log10(max(paid)))
    steps = [
        factor * 10.0**power for power in range(first, last + 1) for factor in BUDGETS_PER_DECADE
    ]
    above = [step for step in steps if step >= max(paid)]
    return [step for step in steps if min(paid) <= step < max(paid)] + above[:1]


def _targets(runs: Sequence[EdgeRun]) -> list[float]:
    values = [value for run in runs for _, _, value in run.points if math.isfinite(value)]
    start = runs[0].points[0][2]
    best = max(values) if greater_is_better(runs[0].metric) else min(values)
    return [start + share * (best - start) for share in SHARES]


def _shown(value: float | None) -> str:
    return "-" if value is None else show_metric(value)


def _size(count: int | None) -> str:
    return "never" if count is None else format_bytes(count)


def _table(heads: Sequence[str], rows: dict[str, list[str]]) -> str:
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    lines += [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--budget", nargs="+", type=float, default=[], help="in bytes, as 1e6")
    parser.add_argument("--target", nargs="+", type=float, default=[], help="of the metric")
    parser.add_argument("--out", type=Path, help="write what the runs came to, to this JSON file")
    asked = parser.parse_args(arguments)
    try:
        runs = [EdgeRun.read(folder) for folder in asked.runs]
        if asked.out is not None:
            found = json.dumps([asdict(run) for run in runs], indent=1)
            atomic_write(asked.out, (found + "\n").encode())
        print(as_text(runs, asked.budget, asked.target))
    except InputError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
