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

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedpet.backbone.device import device_of
from fedpet.backbone.module_roles import maskable_weights
from fedpet.config import MaskConfig, SearchConfig
from fedpet.data.rows import Rows
from fedpet.errors import ConfigError, DataError, RunError, StructureError
from fedpet.pet.structure import Structure
from fedpet.search.bilevel import BiLevel
from fedpet.search.gates import probabilities
from fedpet.search.settings import deviations, reproducible_settings, temperature
from fedpet.search.space import Space, model_of_space, space_for
from fedpet.training.auto_rates import auto_learning_rates
from fedpet.training.batching import batches
from fedpet.training.evaluation import predict
from fedpet.training.loss import client_loss
from fedpet.training.metrics import greater_is_better, metric_value
from fedpet.utils.seeds import derive_seed

if TYPE_CHECKING:
    from fedpet.backbone.pretrained import Backbone
    from fedpet.data import Task
    from fedpet.pet.mask import Mask

__all__ = [
    "SearchProgress",
    "SearchResult",
    "Split",
    "candidate_records",
    "check_structure",
    "random_structure",
    "repeat_file",
    "run_search",
    "split_rows",
    "step_batches",
]


SAVE_SECONDS = 15.0  # of work that a kill may cost


@dataclass(frozen=True)
class Split:
    """The rows of each part: int64 indices, no row in two of them."""

    theta: np.ndarray  # move the candidates' values
    alpha: np.ndarray  # move alpha; as many
    validation: np.ndarray  # pick the checkpoint


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
            saved = _Saved(
                repeat_file(state_file, repeat),
                _digest(
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


def repeat_file(state_file: Path | None, repeat: int) -> Path | None:
    """Return where the state of one repeat of a search lies; of the first the file itself.

    Example:
        >>> repeat_file(Path("state.pt"), 2).name
        'state.pt.2'
    """
    if state_file is None or not repeat:
        return state_file
    return state_file.with_name(f"{state_file.name}.{repeat}")


def _search_once(
    search: BiLevel,
    saved: _Saved,
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
        elif time.monotonic() - saved.at > SAVE_SECONDS:
            saved.save(search, best, history)
        if progress is not None:
            known = float(best["score"]) if best else None
            progress(SearchProgress(step, total, losses.theta, losses.alpha, score, known))
    return best, history


def random_structure(space: Space, budget: float, *, seed: int, fingerprint: str = "") -> Structure:
    """Draw a structure of a space under a budget: what a searched one must beat.

    Raises:
        StructureError: The budget does not fit the space.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> small = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        ...                    intermediate_size=64, vocab_size=50)
        >>> model = BertForSequenceClassification(small)
        >>> space = space_for(SearchConfig(), model)
        >>> drawn = random_structure(space, budget=300, seed=0)
        >>> drawn.provenance["values"] <= 300
        True
    """
    space.check_budget(budget)
    drawn = derive_seed("random structure", seed)
    chosen = space.select_at_random(budget, seed=drawn)
    return replace(
        space.structure(chosen),
        fingerprint=fingerprint,
        provenance={
            "method": "random",
            "seed": seed,
            "budget": budget,
            "values": space.chosen_size(chosen),
            "space": {"name": space.name, "values": space.num_values},
        },
    )


def check_structure(structure: Structure, fingerprint: str) -> None:
    """Refuse a structure that was found on another backbone.

    Raises:
        StructureError: The fingerprints differ. A structure without one fits any backbone that
            has its targets.
    """
    if structure.fingerprint and structure.fingerprint != fingerprint:
        raise StructureError(
            f"a searched structure belongs to its backbone: this one was found on the checkpoint "
            f"{structure.fingerprint:.12}, the backbone here is {fingerprint:.12}. Take that "
            "checkpoint, search again on this one, or name a preset: structure.preset = 'lnfit'."
        )


def split_rows(
    indices: np.ndarray, config: SearchConfig, owners: np.ndarray | None = None
) -> Split:
    """Split rows at random, by the seed, into validation and two halves of equal size.

    Args:
        indices: Rows, (n,).
        config: Its seed, the fraction of validation, and whether clients stay whole.
        owners: Of each row, its client's number: int64, (n,). Where clients stay whole, no client
            has rows in two parts; what the larger half has more is left out.

    Raises:
        DataError: Fewer than three rows, or clients.
        ConfigError: Clients shall stay whole, and there are none.
    """
    if config.split == "clients":
        return _split_clients(indices, config, owners)
    if len(indices) < 3:
        raise DataError(
            f"a search splits its rows in three, and got {len(indices)}. Give it more rows."
        )
    order = np.random.default_rng(derive_seed("split", config.seed)).permutation(indices)
    held = min(max(1, round(config.validation_fraction * len(order))), len(order) - 2)
    half = (len(order) - held) // 2
    return Split(
        theta=order[held : held + half],
        alpha=order[held + half : held + 2 * half],
        validation=order[:held],
    )


def _split_clients(indices: np.ndarray, config: SearchConfig, owners: np.ndarray | None) -> Split:
    if owners is None:
        raise ConfigError(
            'search.split = "clients" keeps clients whole, and these rows have none. Set it to '
            '"rows".'
        )
    generator = np.random.default_rng(derive_seed("split", config.seed))
    clients = generator.permutation(np.unique(owners))
    if len(clients) < 3:
        raise DataError(
            f"a search splits its clients in three, and got {len(clients)}. Give it more clients, "
            'or set search.split = "rows".'
        )
    wanted = config.validation_fraction * len(indices)
    parts: tuple[list[np.ndarray], ...] = ([], [], [])  # validation, theta, alpha
    rows = [0, 0, 0]
    for number, client in enumerate(clients):
        into = number if number < 3 else 0
        if number >= 3 and rows[0] >= wanted:
            into = 1 if rows[1] <= rows[2] else 2
        own = indices[owners == client]
        parts[into].append(own)
        rows[into] += len(own)
    validation, theta, alpha = (generator.permutation(np.concatenate(part)) for part in parts)
    half = min(len(theta), len(alpha))
    return Split(theta=theta[:half], alpha=alpha[:half], validation=validation)


def step_batches(
    rows: Rows, split: Split, config: SearchConfig, done: int, total: int
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Yield pairs of batches, theta's and alpha's, of the steps from `done` to before `total`.

    Each epoch over the two halves has its own order.
    """
    per_epoch = -(-len(split.theta) // config.batch_size)
    step = done // per_epoch * per_epoch
    while step < total:
        parts = []
        for name, part in (("theta", split.theta), ("alpha", split.alpha)):
            seed = derive_seed("order", config.seed, step // per_epoch, name)
            generator = np.random.default_rng(seed)
            parts.append(list(batches(part, rows.lengths, config.batch_size, generator)))
        for theta, alpha in zip(*parts, strict=True):
            if done <= step < total:
                yield rows.batch(theta), rows.batch(alpha)
            step += 1


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


def _digest(
    config: SearchConfig,
    losses: tuple[float, str],
    products: str,
    backbone: Backbone,
    rows: Rows,
    task: Task,
    mask: Mask | None,
) -> str:
    """Hash all that a search's steps depend on."""
    masked = None if mask is None else mask.digest()
    settings = (sorted(reproducible_settings(config).items()), losses, products)
    digest = hashlib.sha256(repr((settings, backbone.fingerprint, task, masked)).encode())
    for part in (rows.tokens, rows.offsets, rows.labels, rows.tags, rows.choices):
        if part is not None:
            digest.update(np.ascontiguousarray(part).tobytes())
    if rows.dense is not None:
        digest.update(np.ascontiguousarray(rows.dense.values).tobytes())
    return digest.hexdigest()


class _Saved:
    """A search's state on disk, under the digest of what it searches."""

    def __init__(self, path: Path | None, digest: str) -> None:
        self._path, self._digest = path, digest
        self.at = time.monotonic()  # of the last saving

    def load(self, search: BiLevel) -> tuple[dict[str, Any], list[dict[str, float]]]:
        """Go on from the file where there is one; give the best checkpoint and the history."""
        if self._path is None or not self._path.exists():
            return {}, []
        try:
            table = torch.load(self._path, weights_only=True)
            digest = table["digest"]
        except Exception as error:  # torch names no class for what a file may not be
            raise ConfigError(
                f"{str(self._path)!r} is not the state of a search "
                f"({type(error).__name__}): remove it, or name another file."
            ) from None
        if digest != self._digest:
            raise ConfigError(
                f"{str(self._path)!r} is the state of a search with other settings, rows or "
                "backbone: remove it, or name another file."
            )
        search.load_state(table["search"])
        return table["best"], table["history"]

    def save(self, search: BiLevel, best: dict[str, Any], history: list[dict[str, float]]) -> None:
        if self._path is None:
            return
        table = {
            "digest": self._digest,
            "search": search.state(),
            "best": best,
            "history": history,
        }
        new = self._path.with_name(self._path.name + ".new")
        torch.save(table, new)
        os.replace(new, self._path)
        self.at = time.monotonic()
