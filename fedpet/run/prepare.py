"""Prepare a run before its first message: rows, clients, the backbone, a plan.

In:  an experiment.
Out: `Prepared` for the training rounds; or `PreparedSearch`, where clients search the structure
     first.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from fedpet.backbone.device import check_device, device_of
from fedpet.backbone.module_roles import find_target_modules
from fedpet.backbone.pretrained import Backbone, Origin, load_for_task, locate
from fedpet.client.node_config import make_cache
from fedpet.client.trainer_loop import check_training
from fedpet.client.trainer_script import ScriptTrainers, TrainerScript
from fedpet.codec import check_codecs
from fedpet.config import ClientEvaluation, Experiment
from fedpet.data import (
    FederatedData,
    count_classes,
    describe_classes,
    load_data,
    load_evaluation,
)
from fedpet.errors import ConfigError
from fedpet.export.peft_adapter import check_expressible
from fedpet.export.start_values import start_values
from fedpet.pet.kernels.matmul import bound_onednn_cache
from fedpet.pet.kernels.matmul_timing import settle_product
from fedpet.pet.model import PetModel
from fedpet.pet.structure import Structure, load_structure
from fedpet.pet.tiers import Tier, tiers_of
from fedpet.protocol.plan import Plan
from fedpet.run.callbacks import Callback
from fedpet.run.central_search import mask_beside, resolve_search
from fedpet.search import Space
from fedpet.tasks import Task
from fedpet.training.batching import inputs_of
from fedpet.training.block_checkpointing import check_checkpointing
from fedpet.training.cls_only import check_first_token
from fedpet.training.input_checks import check_inputs
from fedpet.training.text_metrics import check_text_metrics
from fedpet.utils.paths import expand

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Prepared", "PreparedSearch", "is_deployed", "prepare"]


@dataclass(frozen=True)
class RunInputs:
    """Inputs that every run has."""

    experiment: Experiment
    data: FederatedData
    all_parameters: int  # of the backbone and its head
    pretrained_parameters: int
    origin: Origin  # of the parameters: checkpoint or seed
    started: float  # on `time.perf_counter`'s clock


@dataclass(frozen=True)
class Prepared(RunInputs):
    """Inputs of the training rounds."""

    structure: Structure  # with what a search tells of it; the plan has its modules alone
    plan: Plan
    pet: PetModel  # the server's own
    start: np.ndarray | None = None  # values of round 0; None: zeros, the checkpoint


@dataclass(frozen=True)
class PreparedSearch(RunInputs):
    """Inputs of the rounds of a search, after which the training's plan is made."""

    backbone: Backbone  # the checkpoint, for the training's plan
    plan: Plan
    space: Space
    tiers: tuple[Tier, ...]
    inexact_kinds: tuple[str, ...]  # of the space's modules

    def with_structure(self, structure: Structure) -> Prepared:
        """Make the training's plan of this structure. The backbone is used up."""
        return _training_inputs(self, self.backbone, structure)


def prepare(
    experiment: Experiment, callback: Callback, *, structure: Structure | None = None
) -> Prepared | PreparedSearch:
    """Read the rows, load the backbone, find the structure or the space, make the plan.

    Args:
        experiment: What to run.
        callback: Is called at stages.
        structure: Of a search of this run that is over.

    Raises:
        InputError: The experiment, the checkpoint or the data cannot be used.
    """
    started = time.perf_counter()
    bound_onednn_cache()
    experiment = experiment.located()
    check_codecs(experiment.codec)
    asked = experiment.data
    check_text_metrics(Task(asked.task, asked.label_names, asked.metric, asked.metrics))
    device = check_device(experiment.run.device)
    callback.on_stage("reading and tokenising the rows")
    folder, cache = locate(experiment.backbone), make_cache(experiment)
    if is_deployed(experiment):
        data = load_evaluation(
            experiment.data,
            folder,
            cache=cache,
            client_column=experiment.clients.client_column,
            on_rows=callback.on_rows,
        )
    else:
        data = load_data(
            experiment.data, experiment.clients, folder, cache=cache, on_rows=callback.on_rows
        )
    if experiment.strategy.weights == "rows":
        data = replace(data, task=replace(data.task, weights="rows"))
    for line in describe_classes(count_classes(data), trained_here=not is_deployed(experiment)):
        callback.on_stage(line)
    callback.on_stage(f"loading the backbone {experiment.backbone.model!r}, settling the plan")
    backbone = load_for_task(experiment.backbone, data.task, device=device)
    for line in backbone.origin.lines():
        callback.on_stage(line)
    training = settle_product(experiment.training, backbone.model, cache)  # one for the whole run
    experiment = replace(experiment, training=training)
    inputs = RunInputs(
        experiment,
        data,
        _num_parameters(backbone.model),
        backbone.pretrained_parameters,
        backbone.origin,
        started,
    )
    _check_enough_clients(experiment, data)
    rows = data.evaluation if len(data.evaluation) else data.train  # a server may have none
    if len(rows):
        check_inputs(backbone.model, rows, experiment.data.max_length)
    if experiment.training.cls_only and len(rows):
        one, _ = inputs_of(rows, np.arange(1), device_of(backbone.model))
        check_first_token(backbone.model, one)
    if experiment.training.gradient_checkpointing:
        check_checkpointing(backbone.model)
    if experiment.clients.script:
        check_training(experiment.training)
        script = TrainerScript(expand(experiment.clients.script))
        ScriptTrainers(script, data).adopt_model(backbone)  # or refuse it
    if experiment.search.federated and structure is None:
        return _search_inputs(inputs, backbone)
    if structure is None:
        positions = find_target_modules(backbone.model, backbone.head)
        structure = load_structure(experiment.structure, positions)
    return _training_inputs(inputs, backbone, structure)


def is_deployed(experiment: Experiment) -> bool:
    """Tell a deployment, whose nodes bring the clients, from a simulation."""
    return experiment.clients.partition == "nodes"


def _training_inputs(inputs: RunInputs, backbone: Backbone, structure: Structure) -> Prepared:
    """Make the training's plan of a structure of this backbone."""
    structure.check_backbone(backbone.fingerprint)
    data = inputs.data
    plan, pet = Plan.for_training(
        inputs.experiment, backbone, structure, data.task, data.tokenizer_hash
    )
    if not plan.num_values:
        raise ConfigError(
            "nothing is trained: backbone.head is 'keep', mask.enabled is false and the structure "
            "is empty. Enable one of them."
        )
    if inputs.experiment.run.save_every:
        check_expressible(pet)
    folder = inputs.experiment.run.start
    return Prepared(
        inputs.experiment,
        data,
        inputs.all_parameters,
        inputs.pretrained_parameters,
        inputs.origin,
        inputs.started,
        structure,
        plan,
        pet,
        start_values(expand(folder), plan, pet) if folder else None,
    )


def _search_inputs(inputs: RunInputs, backbone: Backbone) -> PreparedSearch:
    """Make the search's plan; the backbone is the checkpoint again."""
    experiment, data = inputs.experiment, inputs.data
    search = resolve_search(experiment, backbone, mask_beside(experiment, backbone))
    plan, model = Plan.for_search(experiment, search, backbone, data.task, data.tokenizer_hash)
    tiers, inexact = tiers_of(model, plan.mask), model.inexact_kinds
    model.pet.unload()
    return PreparedSearch(
        experiment,
        data,
        inputs.all_parameters,
        inputs.pretrained_parameters,
        inputs.origin,
        inputs.started,
        backbone,
        plan,
        model.space,
        tiers,
        inexact,
    )


def _num_parameters(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _check_enough_clients(experiment: Experiment, data: FederatedData) -> None:
    """Refuse a run none of whose rounds could have the replies that its rule needs."""
    least = experiment.strategy.min_usable_replies
    clients = experiment.clients.num_clients if is_deployed(experiment) else len(data.clients)
    rule = ClientEvaluation.of(experiment.clients)
    if rule is not None and rule.unseen_fraction and not is_deployed(experiment):
        unseen = sum(rule.is_unseen(client.id) for client in data.clients)
        if not 0 < unseen < clients:
            raise ConfigError(
                f"clients.unseen-fraction = {rule.unseen_fraction:g} keeps {unseen} of the "
                f"{clients} clients from training, by a hash of their names: give a fraction, or a "
                "clients.seed, that leaves some on either side."
            )
        clients -= unseen
    held_out = any(len(client.held_out) for client in data.clients)
    if rule is not None and rule.fraction and data.clients and not held_out:
        raise ConfigError(
            f"clients.eval-fraction = {rule.fraction:g} leaves no client with a row to evaluate "
            f"on: a client keeps at least clients.min-rows = {rule.min_rows} to train on. Lower "
            "clients.min-rows, or raise the fraction."
        )
    if clients < least:
        raise ConfigError(
            f"strategy {experiment.strategy.name!r} with these parameters, and min-replies, need "
            f"{least} usable replies a round, and there are {clients} clients "
            f"({data.left_out_clients} have too few rows): take another strategy or other "
            "parameters."
        )
