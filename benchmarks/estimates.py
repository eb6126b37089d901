"""Compare estimates with the ledgers of recorded runs.

    python -m benchmarks.estimates [FOLDER]

Every cell of a table (`python -m benchmarks table`) holds the settings of its run and
what its ledger came to. Here each is estimated from its settings alone, by configuration and data,
and held against the ledger: bytes up, down, of plans, in total. Exits with 1 if a total is farther
off than its estimate says it may be. Nothing is trained: a few seconds a cell. Cells whose data are
not here are left out, and named; so are those under attack, whose liars send what no plan asks for.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.experiment_grid import FEDPET
from benchmarks.stored_settings import stored_experiment
from fedpet.config import Experiment
from fedpet.estimate import estimate

RESULTS = Path(__file__).parent / "results"
NAMES = ("uplink_bytes", "downlink_bytes", "plan_bytes", "total_bytes")


def recorded(folder: Path) -> Iterator[tuple[str, Experiment, dict[str, Any]]]:
    """Yield name, settings and communication of fedpet's runs below a folder."""
    for path in sorted(folder.rglob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or "attacks" in path.parts:
            continue  # checks.json: cells that were run again
        if content.get("runs") == FEDPET and content["result"]["run"]["status"] == "ok":
            experiment = stored_experiment(content["settings"])
            if experiment.search.federated:
                continue  # no estimate foresees a structure
            name = str(path.relative_to(folder).with_suffix(""))
            yield name, experiment, content["result"]["communication"]


def has_its_data(experiment: Experiment) -> bool:
    """Tell whether the rows of a recorded run can be read here."""
    source = experiment.data.source
    return source == "bundled" or Path(source).exists()


def deviations(experiment: Experiment, communication: dict[str, Any]) -> dict[str, float]:
    """Return an estimate's deviations from a ledger, and the allowed one, as fractions of bytes."""
    estimated = estimate(experiment)
    off = {name: estimated.communication[name] / communication[name] - 1 for name in NAMES}
    return {**off, "tolerance": estimated.tolerance}


def main() -> None:
    """Compare, print, exit with 1 if an estimate is off."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=RESULTS)
    parser.add_argument("--cache", default="", help="where tokenised data are stored")
    arguments = parser.parse_args()
    table = Table("cell", "up", "down", "downlink", *NAMES)
    worst, wrong = 0.0, 0
    for name, experiment, communication in recorded(arguments.folder):
        if not has_its_data(experiment):
            print(f"left out: {name}, {experiment.data.source!r} is not here")
            continue
        settings = replace(experiment, run=replace(experiment.run, cache=arguments.cache))
        found = deviations(settings, communication)
        off = abs(found["total_bytes"])
        worst, wrong = max(worst, off), wrong + (off > found["tolerance"])
        codec = experiment.codec
        table.add_row(
            name,
            codec.uplink + (f", head {codec.head_uplink}" if codec.head_uplink else ""),
            codec.downlink + (f", head {codec.head_downlink}" if codec.head_downlink else ""),
            codec.downlink_mode + (", feedback" if codec.error_feedback else ""),
            *(f"{found[key]:+.2%}" for key in NAMES),
        )
    Console().print(table)
    print(f"the total farthest off: {worst:.2%}; farther than allowed: {wrong}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
