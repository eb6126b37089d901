"""Ask a search's gates two things: do searches of other seeds agree, and do gates foretell gains?

    python -m benchmarks.search_agreement [EXPERIMENT] [--set KEY=VALUE] [--like STRUCTURE]
        [--out FILE] [--rows train] [--searches 6] [--alone 24] [--steps 60]

The experiment gives backbone, search and rates, or, with --like, the file of a structure says how
it was searched; the rows are those of a split on which no result is reported. Written to FILE as it
goes, and gone on with from there:

    searches    alpha and choice of each seed
    agreement   mean Jaccard index, by values, of two choices: each of one search, of the mean alpha
                of two, of three, no search in both; and of two random structures of that budget
    alone       some candidates, drawn evenly over the kinds: the fall of the loss on held-out rows
                that each brings beside the head when it is trained alone
    correlation of gate (mean alpha) and gain, by rank (Spearman): of all, and within kinds
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.cell import write_json
from fedpet.backbone.module_roles import maskable_weights
from fedpet.backbone.pretrained import Backbone, load_for_task, locate
from fedpet.client.node_config import make_cache
from fedpet.config import ClientsConfig, Experiment, SearchConfig, TrainingConfig
from fedpet.config.builtin import load_experiment
from fedpet.data import FederatedData, load_data
from fedpet.pet.mask import build_mask
from fedpet.pet.model import PetModel
from fedpet.pet.structure import Structure
from fedpet.run.central_search import owners_of, resolve_search
from fedpet.run.run_folder import machine, versions
from fedpet.search import Space, run_search, space_for
from fedpet.training.evaluation import predict
from fedpet.training.loop import train_rows
from fedpet.utils.seeds import derive_seed

EVERYBODY = ClientsConfig(partition="iid", num_clients=1, min_rows=1)
Report = dict[str, Any]


def jaccard(space: Space, one: Sequence[int], other: Sequence[int]) -> float:
    """Return the values in both choices, as a fraction of those in either.

    Candidates count by their values, since a block of the mask is smaller than most modules.
    """
    first, second = set(one), set(other)
    both = sum(space.sizes[index] for index in first & second)
    return both / max(1, sum(space.sizes[index] for index in first | second))


def agreement(space: Space, alphas: np.ndarray, budget: float) -> dict[str, Any]:
    """Compare the choices of means of alpha over groups of searches, by the size of the groups.

    Args:
        alphas: (searches, candidates).
        budget: In values.
    """
    found: dict[str, Any] = {}
    for size in range(1, len(alphas) // 2 + 1):
        groups = list(combinations(range(len(alphas)), size))
        choices = {g: space.select(alphas[list(g)].mean(0).tolist(), budget) for g in groups}
        pairs = [(a, b) for a, b in combinations(groups, 2) if not set(a) & set(b)]
        each = [jaccard(space, choices[a], choices[b]) for a, b in pairs]
        found[f"mean of {size}"] = {"jaccard": round(float(np.mean(each)), 4), "pairs": len(each)}
    drawn = [space.select_at_random(budget, seed=seed) for seed in range(12)]
    chance = [jaccard(space, a, b) for a, b in combinations(drawn, 2)]
    found["random"] = {"jaccard": round(float(np.mean(chance)), 4), "pairs": len(chance)}
    ranks = np.argsort(np.argsort(alphas, 1), 1)
    pairs_of_ranks = [np.corrcoef(a, b)[0, 1] for a, b in combinations(ranks, 2)]
    found["rank correlation of alpha"] = round(float(np.mean(pairs_of_ranks)), 4)
    return found


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the correlation of the ranks of two lists; ties go by place.

    Example:
        >>> spearman([1.0, 2.0, 3.0], [0.1, 0.5, 0.9])
        1.0
    """
    ranks = [np.argsort(np.argsort(each, kind="stable"), kind="stable") for each in (one, other)]
    return round(float(np.corrcoef(ranks[0], ranks[1])[0, 1]), 4)


def drawn_evenly(space: Space, count: int, seed: int) -> list[int]:
    """Draw candidates, as many of each kind as there are to have; ascending."""
    generator = np.random.default_rng(derive_seed("alone", seed))
    kinds: dict[str, list[int]] = {}
    for index in generator.permutation(len(space.candidates)).tolist():
        kinds.setdefault(space.candidates[index].spec.kind, []).append(index)
    chosen: list[int] = []
    while len(chosen) < min(count, len(space.candidates)):
        for of_kind in kinds.values():
            if of_kind and len(chosen) < count:
                chosen.append(of_kind.pop())
    return sorted(chosen)


def loss_alone(
    backbone: Backbone,
    data: FederatedData,
    space: Space,
    chosen: Sequence[int],
    config: SearchConfig,
    *,
    steps: int,
    seed: int,
) -> float:
    """Train some candidates, ungated, and the head; return the mean loss of held-out rows."""
    order = np.random.default_rng(derive_seed("rows", seed)).permutation(len(data.train))
    held = order[: len(order) // 3]
    used = order[len(held) :][: steps * config.batch_size]
    structure = space.structure(chosen)
    scope = maskable_weights(backbone.model, backbone.head)
    mask = None
    if structure.mask is not None and space.mask_config is not None:
        mask = build_mask(scope, space.mask_config, structure.mask)
    pet = PetModel(backbone, mask, structure, seed=seed)
    training = TrainingConfig(
        learning_rate=config.learning_rate,
        learning_rates=config.learning_rates,
        batch_size=config.batch_size,
        local_epochs=-(-steps * config.batch_size // len(used)),
        cls_only=True,
    )
    try:
        groups = pet.parameter_groups()
        train_rows(pet.model, groups, data.train, used, data.task, training, seed=seed)
        logits = torch.from_numpy(predict(pet.model, data.train.take(held)))
    finally:
        pet.unload()
    return float(nn.functional.cross_entropy(logits, torch.as_tensor(data.train.labels[held])))


def measure(
    experiment: Experiment, report: Report, out: Path | None, options: argparse.Namespace
) -> None:
    """Fill in what the report lacks."""
    folder, cache = locate(experiment.backbone), make_cache(experiment)
    source = replace(experiment.data, train_split=options.rows)
    by_client = experiment.search.split == "clients"
    clients = experiment.clients if by_client else EVERYBODY
    data = load_data(source, clients, folder, cache=cache, evaluation=False)
    backbone = load_for_task(experiment.backbone, data.task)
    config = resolve_search(experiment, backbone, None)
    space = space_for(config, backbone.model, experiment.mask, head=backbone.head)

    def keep() -> None:
        if out is not None:
            write_json(out, report)

    searches = report.setdefault("searches", [])
    for seed in range(len(searches), options.searches):
        started = time.process_time()
        found = run_search(
            backbone,
            data.train,
            np.arange(len(data.train)),
            data.task,
            replace(config, seed=seed),
            owners=owners_of(data, None) if by_client else None,
            mask_config=experiment.mask,
            logit_adjustment=experiment.training.logit_adjustment,
        )
        searches.append(
            {
                "seed": seed,
                "alpha": [round(alpha, 6) for alpha in found.alpha],
                "score": found.score,
                "cpu_seconds": round(time.process_time() - started, 1),
            }
        )
        keep()
        print(f"search {seed}: {found.score:.4f}, {searches[-1]['cpu_seconds']} s", flush=True)
    alphas = np.asarray([entry["alpha"] for entry in searches])
    report["space"] = {
        "name": space.name, "candidates": len(space.candidates), "values": space.num_values,
        "budget": int(config.budget),
    }  # fmt: skip
    report["agreement"] = agreement(space, alphas, float(config.budget))
    keep()
    print(json.dumps(report["agreement"], indent=1), flush=True)
    alone = report.setdefault("alone", [])
    ask = {"steps": options.steps, "seed": 0}
    if "head_loss" not in report:
        report["head_loss"] = loss_alone(backbone, data, space, [], config, **ask)
    done = {entry["candidate"] for entry in alone}
    for index in drawn_evenly(space, options.alone, seed=0):
        if index in done:
            continue
        loss = loss_alone(backbone, data, space, [index], config, **ask)
        candidate = space.candidates[index]
        alone.append(
            {
                "candidate": index, "kind": candidate.spec.kind, "target": candidate.spec.target,
                "size": candidate.size, "gain": round(report["head_loss"] - loss, 6),
            }
        )  # fmt: skip
        keep()
        print(f"{candidate.spec.kind} {candidate.spec.target}: {alone[-1]['gain']:.4f}", flush=True)
    mean, gains = alphas.mean(0), [entry["gain"] for entry in alone]
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for entry in alone:
        by_kind.setdefault(entry["kind"], []).append(entry)
    report["correlation"] = {
        "all": spearman([mean[entry["candidate"]] for entry in alone], gains),
        "per value": spearman(
            [mean[entry["candidate"]] for entry in alone], [e["gain"] / e["size"] for e in alone]
        ),
        "candidates": len(alone),
        "mean gain by kind": {
            kind: round(float(np.mean([e["gain"] for e in entries])), 5)
            for kind, entries in by_kind.items()
        },
        "mean alpha by kind": {
            kind: round(float(np.mean([mean[e["candidate"]] for e in entries])), 5)
            for kind, entries in by_kind.items()
        },
    }
    print(json.dumps(report["correlation"], indent=1), flush=True)
    report["status"] = "ok"
    keep()


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; `--out` keeps the numbers, and is gone on with."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("experiment", nargs="?", default="film-reviews")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--like", type=Path, help="a structure's file: search as it was searched")
    parser.add_argument("--rows", default="train", help="split to search on")
    parser.add_argument("--searches", type=int, default=6)
    parser.add_argument("--alone", type=int, default=24, help="candidates trained alone")
    parser.add_argument("--steps", type=int, default=60, help="of each candidate's training")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    experiment = load_experiment(options.experiment, options.set)
    if options.like is not None:
        found = Structure.from_json(options.like.read_text(encoding="utf-8"))
        settings = found.provenance["settings"].items()
        settings = {key: tuple(v) if isinstance(v, list) else v for key, v in settings}
        experiment = replace(experiment, search=SearchConfig(**settings))
    asked = {
        "experiment": options.experiment, "set": options.set, "rows": options.rows,
        "search": experiment.to_tables()["search"], "steps": options.steps,
    }  # fmt: skip
    report: Report = {}
    if options.out is not None and options.out.exists():
        report = json.loads(options.out.read_text(encoding="utf-8"))
        if report.get("asked") != asked:
            print(f"{options.out} was measured with {report.get('asked')}: name another file.")
            return 2
    report |= {
        "schema": 1, "benchmark": "search_agreement", "asked": asked, "machine": machine(),
        "versions": versions(),
    }  # fmt: skip
    measure(experiment, report, options.out, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
