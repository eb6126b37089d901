"""Run a whole search on one machine (S3PET): by gradient, under an exact budget.

In:  a backbone, labelled rows, a budget.
Out: a `SearchResult`: a `Structure` with its gates and where it came from, ready to be trained from
     scratch, and how likely every other candidate was.

The rows are split once, by the seed: some to pick the checkpoint, half of the rest to move the
candidates' values, half to move alpha. Each step is that of `fedpet.search.bilevel`; every so many
steps the validation rows are scored with the gates at p, and the last of the best checkpoints gives
alpha. Selection walks its candidates from the likeliest down.

Source: S3PET (Hu et al., NeurIPS 2022, arXiv:2206.07382), released code. Ours: the head, which the
paper's text-to-text models lack, is trained with the candidates' values and is not gated;
validation rows are taken from the rows given, so that the evaluation rows stay unseen.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedpet.backbone.device import device_of
from fedpet.backbone.module_roles import maskable_weights
from fedpet.config import MaskConfig, SearchConfig
from fedpet.data.rows import Rows
from fedpet.errors import RunError
from fedpet.pet.structure import Structure
from fedpet.search.bilevel import BiLevel
from fedpet.search.gates import probabilities
from fedpet.search.saved_search import SavedSearch, repeat_file, search_digest
from fedpet.search.search_rows import Split, split_rows, step_batches
from fedpet.search.settings import deviations, reproducible_settings, temperature
from fedpet.search.space import Space, model_of_space, space_for
from fedpet.training.auto_rates import auto_learning_rates
from fedpet.training.evaluation import predict
from fedpet.training.loss import client_loss
from fedpet.training.metrics import greater_is_better, metric_value
from fedpet.utils.seeds import derive_seed

if TYPE_CHECKING:
    from fedpet.backbone.pretrained import Backbone
    from fedpet.data import Task
    from fedpet.pet.mask import Mask

__all__ = ["SearchProgress", "SearchResult", "candidate_records", "run_search"]


@dataclass(frozen=True)
class SearchProgress:
    """One step, as a listener sees it."""

    step: int
    total_steps: int
    theta_loss: float
    alpha_loss: float
    score: float | None  # of the validation rows, where this step was evaluated
    best_score: float | None


@dataclass(frozen=True)
class SearchResult:
    """The outcome of a search."""

    structure: Structure
    space: Space
    probabilities: tuple[float, ...]  # of every candidate, at the checkpoint
    alpha: tuple[float, ...]
    chosen: tuple[int, ...]  # of the space's candidates, likeliest first
    step: int  # of the checkpoint
    score: float  # its validation score
    history: tuple[Mapping[str, float], ...]  # an entry an evaluation
    seconds: float  # wall time of this process's part


def run_search(
    backbone: Backbone,
    rows: Rows,
    indices: np.ndarray,
    task: Task,
    config: SearchConfig,
    *,
    owners: np.ndarray | None = None,
    mask: Mask | None = None,
    mask_config: MaskConfig | None = None,
    logit_adjustment: float = 0.0,
    loss: str = "",
    products: str = "torch",
    state_file: Path | None = None,
    progress: Callable[[SearchProgress], None] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> SearchResult:
    """Search one structure on labelled rows.

    Args:
        backbone: Is changed in place during the search and is the checkpoint again after it.
        rows: All tokenised rows here.
        indices: Those to search on, (n,).
        task: Says which loss and which validation metric.
        config: Settled (`fedpet.search.resolve_settings`): its budget is in values.
        owners: The client of each of those, (n,); see `split_rows`.
        mask: Trained beside the candidates and not gated; None for none. A space that has the
            mask among its candidates takes its own in this one's place.
        mask_config: Whose rule ranks the entries of such a space.
        logit_adjustment: Of both losses, for the rows' labels, as in training.
        loss: Of both levels, as `training.loss`: "" is the task's own.
        products: Of dense layers, as in training; see `PetModel`.
        state_file: Written at every evaluation and every few seconds; a search that finds its
            own goes on from there, bit for bit.
        progress: Told of every step.
        provenance: What else the structure should say about where it came from.

    Raises:
        StructureError: The budget does not fit the space, or the space this backbone.
        ConfigError: `state_file` belongs to another search.
        DataError: Too few rows to split.
        RunError: The model's outputs are not finite, at whichever checkpoint.
    """
    started = time.perf_counter()
    space = space_for(config, backbone.model, mask_config, head=backbone.head)
    budget = float(config.budget)
    space.check_budget(budget)
    mask = space.build_mask(maskable_weights(backbone.model, backbone.head)) or mask
    loss_of = client_loss(
        rows.labels[indices], task, logit_adjustment, device_of(backbone.model), loss
    )
    found: list[dict[str, Any]] = []  # the best checkpoint of each repeat
    history: list[dict[str, float]] = []
    for repeat in range(config.repeats):
        own = config
        if repeat:
            own = replace(config, seed=derive_seed("repeat", config.seed, repeat))
        split = split_rows(indices, own, owners)
        total = own.epochs * -(-len(split.theta) // own.batch_size)
        total = min(total, own.max_steps or total)
        seed = derive_seed("search", own.seed)
        pet = model_of_space(backbone, space, mask, seed=seed, products=products)
        try:
            if not config.learning_rate:
                config = config.with_rates(auto_learning_rates(pet))
            own = replace(config, seed=own.seed)
            saved = SavedSearch(
                repeat_file(state_file, repeat),
                search_digest(
                    own,
                    (logit_adjustment, loss),
                    products,
                    backbone,
                    rows.take(indices),
                    task,
                    mask,
                ),
            )
            search = BiLevel(pet, space, own, total_steps=total, loss=loss_of)
            best, steps = _search_once(search, saved, rows, split, task, total, progress)
        finally:
            pet.unload()
        if math.isnan(best["score"]):
            raise RunError(
                f"the search came to no model that can be measured: at step {best['step']} the "
                f"{task.metric} of the validation rows is NaN, its outputs are not finite. Lower "
                "search.learning-rate, search.learning-rates or search.gate-learning-rate."
            )
        found.append(best)
        history += [{"repeat": repeat, **entry} for entry in steps] if config.repeats > 1 else steps
    alpha, p, chosen = found[-1]["alpha"], found[-1]["p"], found[-1]["chosen"]
    if config.repeats > 1:
        alpha = torch.stack([best["alpha"] for best in found]).mean(0)
        sizes = torch.tensor(space.sizes, dtype=torch.float64)
        p = probabilities(alpha, sizes, budget, temperature(config, 1.0))
        chosen = space.select(alpha.tolist(), budget)
    score = sum(float(best["score"]) for best in found) / len(found)
    structure = replace(
        space.found(chosen, maskable_weights(backbone.model, backbone.head)),
        fingerprint=backbone.fingerprint,
        gates=space.gates_of(chosen, p.tolist()),
        provenance={
            "method": "s3pet",
            "deviations": list(deviations(config, logit_adjustment, loss)),
            "settings": reproducible_settings(config),
            "budget": int(budget),
            "values": space.chosen_size(chosen),
            "space": {"name": space.name, "values": space.num_values},
            "rows": {name: len(part) for name, part in vars(split).items()},
            "checkpoint": {"step": found[-1]["step"], "of": total, task.metric: score},
            "history": history,
            "candidates": candidate_records(space, p.tolist()),
            **(provenance or {}),
        },
    )
    return SearchResult(
        structure=structure,
        space=space,
        probabilities=tuple(p.tolist()),
        alpha=tuple(alpha.tolist()),
        chosen=tuple(chosen),
        step=int(found[-1]["step"]),
        score=score,
        history=tuple(history),
        seconds=time.perf_counter() - started,
    )


def _search_once(
    search: BiLevel,
    saved: SavedSearch,
    rows: Rows,
    split: Split,
    task: Task,
    total: int,
    progress: Callable[[SearchProgress], None] | None,
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Take all steps of one search; give its best checkpoint, and an entry an evaluation."""
    config = search.config
    best, history = saved.load(search)
    validation = rows.take(split.validation)
    for theta_batch, alpha_batch in step_batches(rows, split, config, search.steps_done, total):
        losses = search.step(theta_batch, alpha_batch)
        step, score = search.steps_done, None
        if step % config.evaluate_every == 0 or step == total:
            score = _score(search, validation, task)
            if not best or config.checkpoint == "last" or _beats(score, best["score"], task.metric):
                best = {
                    "score": score,
                    "step": step,
                    "alpha": search.alpha.detach().clone(),
                    "p": search.probabilities().detach(),
                    "chosen": search.choice(),
                }
            history.append(
                {"step": step, "score": score, "theta": losses.theta, "alpha": losses.alpha}
            )
            saved.save(search, best, history)
        elif saved.is_due:
            saved.save(search, best, history)
        if progress is not None:
            known = float(best["score"]) if best else None
            progress(SearchProgress(step, total, losses.theta, losses.alpha, score, known))
    return best, history


def _score(search: BiLevel, validation: Rows, task: Task) -> float:
    search.open_gates()
    logits = predict(search.pet.model, validation, task)
    return metric_value(task, logits, np.asarray(validation.labels))


def _beats(score: float, best: float, metric: str) -> bool:
    """Tell whether a later checkpoint is at least as good. Any number beats NaN."""
    sign = 1 if greater_is_better(metric) else -1
    return math.isnan(best) or sign * score >= sign * best


def candidate_records(space: Space, p: Sequence[float]) -> list[dict[str, Any]]:
    """List every candidate with its place and gate: a picture of the search is made from these."""
    return [
        {
            "kind": candidate.spec.kind,
            "target": candidate.spec.target,
            "role": candidate.position.role,
            "stack": candidate.position.stack,
            "layer": candidate.position.layer,
            "size": candidate.size,
            "gate": gate,
        }
        for candidate, gate in zip(space.candidates, p, strict=True)
    ]
