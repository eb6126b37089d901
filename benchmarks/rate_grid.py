"""Compare automatic learning rates with a grid of rates by kind, on six data sets.

    python -m benchmarks.rate_grid --data FOLDER

A cell is one short federation at one set of rates, RESULTS/rate_grid/DATA/PLAN/RATES.json: 12
rounds of 8 clients, whose values travel uncoded, in this process. Clients have at most 40 rows, of
a film, mailbox, airline, domain or source; banking77's follow a Dirichlet distribution of 0.1 over
its classes. The grid is a coordinate search: the automatic rates, all kinds' times 3 and a third,
then each kind's alone, times 3 and a third. The best of it is chosen on validation rows; it and the
automatic rates are reported on test rows. A cell that is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cell import ROOT, Cell, Result, check, complete, write_json
from benchmarks.rate_rows import ACCURACY, BACKBONE, ROWS, SOURCES, load
from fedpet.backbone.module_roles import find_target_modules, maskable_weights
from fedpet.backbone.pretrained import load_for_task
from fedpet.config import (
    MaskConfig,
    StructureConfig,
    TrainingConfig,
)
from fedpet.data import FederatedData
from fedpet.data.rows import Rows
from fedpet.errors import FedpetError, InputError
from fedpet.pet.mask import build_mask
from fedpet.pet.model import PetModel
from fedpet.pet.structure import load_structure
from fedpet.tasks.task import Task
from fedpet.training.auto_rates import auto_learning_rates
from fedpet.training.evaluation import predict
from fedpet.training.loop import train_rows
from fedpet.training.metrics import assess
from fedpet.utils.seeds import derive_seed

RESULTS = ROOT / "benchmarks" / "results" / "rate_grid"
ROUNDS, CLIENTS = 12, 8
VALIDATION_ROWS, TEST_ROWS = 600, 1000
AUTOMATIC = "automatic.json"
CLOSE = 0.5  # points


@dataclass(frozen=True)
class Trained:
    """Say what is trained beside the head."""

    density: float  # of the mask; 0 for none
    preset: str
    rank: int = 8


PLANS = {"mask": Trained(0.001, "lnfit"), "lora": Trained(0.0, "lora+lnfit")}


@dataclass(frozen=True)
class RateCell(Cell):
    """Train one plan on one data set at one set of rates.

    Attributes:
        dataset: One of `SOURCES`.
        plan: One of `PLANS`.
        rates: By kind.
        data: Folder of the data sets; only read.
    """

    dataset: str
    plan: str
    rates: tuple[tuple[str, float], ...]
    data: Path

    def settings(self) -> dict[str, Any]:
        """Return what decides the outcome."""
        return {
            "data": asdict(SOURCES[self.dataset]),
            "plan": asdict(PLANS[self.plan]),
            "rates": dict(self.rates),
            "seed": self.seed,
            "federation": {"rounds": ROUNDS, "clients": CLIENTS, "rows_a_client": ROWS},
        }

    def complete_settings(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        """Name the metric of cells that were run while all had the same."""
        return {**stored, "data": {"metric": ACCURACY, **stored["data"]}}

    def run(self) -> Result:
        """Train and evaluate, on one thread."""
        torch.set_num_threads(1)
        started = time.process_time()
        data, test = (load(self.data, self.dataset, split) for split in ("validation", "test"))
        pet = adapted(data, self.plan)
        losses = train(pet, data, dict(self.rates), self.seed)
        found: Result = {"losses": losses, "values": pet.num_values}
        for name, rows in (
            ("validation", first(data.evaluation, VALIDATION_ROWS)),
            ("test", first(test.evaluation, TEST_ROWS)),
        ):
            logits = predict(pet.model, rows, product="onednn")
            found[name] = measured(logits, np.array(rows.labels), data.task)
        return {**found, "processor_seconds": round(time.process_time() - started, 1)}

    def score(self, result: Result) -> float | None:
        """Return the metric on validation rows."""
        return float(result["validation"][SOURCES[self.dataset].metric])

    def fingerprint(self, result: Result) -> dict[str, Any]:
        """Return both measurements."""
        return {name: result[name] for name in ("validation", "test")}


def measured(logits: np.ndarray, labels: np.ndarray, task: Task) -> dict[str, float]:
    """Return the metric, what it is of the commonest class alone, and the loss."""
    likely = torch.log_softmax(torch.from_numpy(logits), -1)[range(len(labels)), labels]
    found = assess(task, logits, labels)
    return {
        task.metric: float(found.value),
        "loss": float(-likely.mean()),
        "majority": float(found.majority_baseline or 0.0),
    }


def first(rows: Rows, count: int) -> Rows:
    """Return the first rows."""
    return rows.take(np.arange(min(count, len(rows))))


def adapted(data: FederatedData, plan: str) -> PetModel:
    """Put a plan on the checkpoint."""
    backbone, what = load_for_task(BACKBONE, data.task, device="cpu"), PLANS[plan]
    model, mask = backbone.model, None
    if what.density:
        config = MaskConfig(density=what.density)
        mask = build_mask(maskable_weights(model, backbone.head), config)
    structure = load_structure(
        StructureConfig(preset=what.preset, rank=what.rank),
        find_target_modules(model, backbone.head),
    )
    return PetModel(backbone, mask, structure, seed=0, products="onednn")


def train(pet: PetModel, data: FederatedData, rates: Mapping[str, float], seed: int) -> list[float]:
    """Run the federation: means weighted by rows, rates that fall linearly over the rounds.

    Returns:
        The mean training loss of each round.
    """
    values, groups = torch.zeros(pet.num_values), pet.parameter_groups()
    generator, losses = np.random.default_rng(derive_seed("lab", seed)), []
    for number in range(ROUNDS):
        factor = 1 - number / ROUNDS
        config = TrainingConfig(
            learning_rate=1.0,  # every kind has its own
            learning_rates=tuple(f"{kind}={rate * factor!r}" for kind, rate in rates.items()),
            logit_adjustment=1.0,
            cls_only=True,
            matmul_backend="onednn",
        )
        total, seen, loss = torch.zeros_like(values, dtype=torch.float64), 0, 0.0
        for index in generator.choice(len(data.clients), CLIENTS, replace=False):
            rows = data.clients[index].rows
            own = derive_seed("c", seed, number, int(index))
            pet.set_delta(values, seed=own)
            result = train_rows(
                pet.model, groups, data.train, rows, data.task, config, seed=own,
                after_step=pet.after_step,
            )  # fmt: skip
            total += pet.get_delta().double() * len(rows)
            seen += len(rows)
            loss += result.loss * len(rows)
        values = (total / seen).float()
        losses.append(loss / seen)
    pet.set_delta(values, seed=0)
    return losses


Place = tuple[Path, Path]  # of the results, and of the data sets


def cell_of(place: Place, dataset: str, plan: str, rates: Mapping[str, float]) -> RateCell:
    """Return the cell of these rates."""
    results, data = place
    name = "-".join(f"{kind}{rate:.3g}" for kind, rate in rates.items())
    path = results / dataset / plan / f"{name}.json"
    return RateCell(path, None, 0, None, dataset, plan, tuple(rates.items()), data)


def grid(place: Place, dataset: str, plan: str) -> list[RateCell]:
    """Return the cells of a data set and a plan; that of the automatic rates comes first."""
    rates = auto_learning_rates(adapted(load(place[1], dataset, "validation"), plan))
    points: list[Mapping[str, float]] = [rates]
    for kinds in (set(rates), *({kind} for kind in rates)):
        points.append({k: rate * 3.0 if k in kinds else rate for k, rate in rates.items()})
        points.append({k: rate / 3.0 if k in kinds else rate for k, rate in rates.items()})
    return [cell_of(place, dataset, plan, point) for point in points]


def as_text(results: Path) -> str:
    """Return the table in Markdown, of the data sets whose cells are there."""
    lines = [
        "| data | plan | metric | points | majority | automatic | best of grid | apart | rates |",
        "|---|---|---|---:|---:|---:|---:|---:|---|",
    ]
    apart: dict[str, list[float]] = {}  # by plan
    for dataset, plans in json.loads((results / AUTOMATIC).read_text(encoding="utf-8")).items():
        for plan, rates in plans.items():
            folder = results / dataset / plan
            found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
            automatic = [cell for cell in found if cell["settings"]["rates"] == rates]
            if not automatic:
                continue
            own = automatic[0]["result"]
            metric = SOURCES[dataset].metric
            best = max(found, key=lambda cell: _validated(cell["result"], metric))
            mine, its = (result["test"][metric] for result in (own, best["result"]))
            shown = ", ".join(f"{k} {rate:.2g}" for k, rate in best["settings"]["rates"].items())
            beside = f"{its:.3f} | {100 * (mine - its):+.1f} | {shown}"
            if len(found) == 1:  # there is nothing to compare with
                beside = " | | "
            else:
                apart.setdefault(plan, []).append(mine - its)
            lines.append(
                f"| {dataset} | {plan} | {metric} | {len(found)} | {own['test']['majority']:.3f} "
                f"| {mine:.3f} | {beside} |"
            )
    said = [
        f'Of plan "{plan}" the automatic rates come to within {CLOSE:g} points of the best, or '
        f"above it, on {sum(round(100 * one, 1) >= -CLOSE for one in found)} of {len(found)} data "
        "sets."
        for plan, found in apart.items()
    ]
    return "\n".join([*lines, "", *said])


def _validated(result: Result, metric: str) -> tuple[float, float]:
    """Order results by their metric on validation rows, and by loss where that is the same."""
    return result["validation"][metric], -result["validation"]["loss"]


def remember(results: Path, cells: Sequence[RateCell]) -> None:
    """Keep the automatic rates of grids, by data set and plan."""
    file = results / AUTOMATIC
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for cell in cells:
        known.setdefault(cell.dataset, {})[cell.plan] = dict(cell.rates)
    write_json(file, known)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rate_grid",
        description="Automatic learning rates beside a grid, on six data sets.",
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the cells")
    parser.add_argument("--only", action="append", default=[], choices=list(SOURCES))
    parser.add_argument("--plan", action="append", default=[], choices=list(PLANS))
    parser.add_argument("--first", type=int, default=99, help="so many cells of each grid")
    parser.add_argument("--check", type=int, default=0, help="run so many cells again")
    given = parser.parse_args()
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    place = given.results, given.data
    grids = [
        grid(place, dataset, plan)[: given.first]
        for plan in given.plan or PLANS
        for dataset in given.only or SOURCES
    ]
    cells = [cell for own in grids for cell in own]
    if given.check:
        return 0 if check(cells, given.check, given.results / "checks.json", say) else 1
    complete(cells, say)
    remember(given.results, [own[0] for own in grids])
    say(as_text(given.results))
    return 0


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except FedpetError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
