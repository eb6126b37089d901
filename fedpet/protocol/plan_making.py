"""The server settles a run's plan, and the model that it is of.

    ... -> model -> codec -> [plan] -> client -> strategy -> ledger -> report

In:  an experiment, a loaded checkpoint, a structure or the settings of a search, the rows' task.
Out: a `Plan`, and the server's own model, built as every node will build its own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fedpet.backbone.module_roles import maskable_weights
from fedpet.config import Experiment, SearchConfig, TrainingConfig
from fedpet.data import Task
from fedpet.pet.layout import layout_hash
from fedpet.pet.mask import Mask, build_mask
from fedpet.pet.model import PetModel
from fedpet.pet.structure import Structure
from fedpet.protocol.plan import Plan, encode_mask
from fedpet.search import SearchModel
from fedpet.training.loss import LOSSES
from fedpet.utils.seeds import derive_seed

if TYPE_CHECKING:
    from fedpet.backbone.pretrained import Backbone

__all__ = ["make_plan", "make_search_plan"]


def make_plan(
    experiment: Experiment,
    backbone: Backbone,
    structure: Structure,
    task: Task,
    tokenizer_hash: str,
) -> tuple[Plan, PetModel]:
    """Settle a run's plan, and build the server's own model from it. The backbone is used up."""
    mask = _mask_of(experiment, backbone)
    pet = PetModel(
        backbone,
        mask,
        structure,
        seed=experiment.run.seed,
        products=experiment.training.matmul_backend,
        mask_config=None if mask is None else experiment.mask,
    )
    plan = _plan(
        experiment,
        backbone.fingerprint,
        mask,
        pet,
        task,
        tokenizer_hash,
        structure=Structure(structure.modules),  # gates and origin stay with the server
        num_rounds=experiment.strategy.num_rounds,
        seed=experiment.run.seed,
    )
    return plan, pet


def make_search_plan(
    experiment: Experiment,
    search: SearchConfig,
    backbone: Backbone,
    task: Task,
    tokenizer_hash: str,
) -> tuple[Plan, SearchModel]:
    """Settle the plan of a federated search, and the model that it is of.

    Its seed is another than the training's, so that no round of the one draws as the other does.

    Args:
        experiment: The run's.
        search: Settled, see `fedpet.search.settle`.
        backbone: In use until `SearchModel.pet.restore` is called, and the checkpoint again then.
        task: Kind, labels, metric.
        tokenizer_hash: Of the tokeniser's files.

    Raises:
        InputError: The backbone has no such space, or the budget does not fit it.
    """
    mask = _mask_of(experiment, backbone)
    seed = derive_seed("structure search", experiment.run.seed, search.seed)
    model = SearchModel.of(
        backbone, mask, search, seed=seed, products=experiment.training.matmul_backend
    )
    plan = _plan(
        experiment,
        backbone.fingerprint,
        mask,
        model,
        task,
        tokenizer_hash,
        structure=Structure(),
        num_rounds=search.rounds,
        seed=seed,
        search=search,
    )
    return plan, model


def _mask_of(experiment: Experiment, backbone: Backbone) -> Mask | None:
    if not experiment.mask.enabled:
        return None
    return build_mask(maskable_weights(backbone.model, backbone.head), experiment.mask)


def _training(experiment: Experiment) -> TrainingConfig:
    """Name a registered loss by its import path, since nodes must find it."""
    training = experiment.training
    if not training.loss:
        return training
    LOSSES.find(training.loss)  # refused here, before any node is
    return replace(training, loss=LOSSES.portable(training.loss))


def _plan(
    experiment: Experiment,
    fingerprint: str,
    mask: Mask | None,
    model: PetModel | SearchModel,
    task: Task,
    tokenizer_hash: str,
    *,
    structure: Structure,
    num_rounds: int,
    seed: int,
    search: SearchConfig | None = None,
) -> Plan:
    explicit = mask is not None and experiment.mask.broadcast == "send"
    return Plan(
        fingerprint=fingerprint,
        head_seed=experiment.backbone.head_seed,
        task=task,
        max_length=experiment.data.max_length,
        tokenizer_hash=tokenizer_hash,
        mask=experiment.mask if mask is not None else None,
        mask_sha256=mask.digest().hex() if mask is not None else "",
        mask_positions=encode_mask(mask) if mask is not None and explicit else b"",
        structure=structure,
        num_values=model.num_values,
        layout=layout_hash(model.tiers),
        codec=experiment.codec,
        training=_training(experiment),
        num_rounds=num_rounds,
        seed=seed,
        search=search,
        head=experiment.backbone.head,
    )
