"""Keep the plan in force loaded: its backbone, adapted model and tokenised rows.

Loading takes seconds and training a client less, so one plan stays in memory from message to
message; a client's values are written into the resident model and read out again.
"""

from __future__ import annotations

import contextlib
import gc
import time
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from fedpet.backbone.device import check_device
from fedpet.backbone.pretrained import load_for_task, locate
from fedpet.client.node_config import NodeConfig
from fedpet.client.plan_store import PlanStore
from fedpet.client.trainer_script import ScriptTrainers, TrainerScript
from fedpet.codec import VectorCodec
from fedpet.data import FederatedData, load_data
from fedpet.data.cache import drop_unused
from fedpet.errors import PlanError
from fedpet.pet.layout import head_groups, quantisation_groups
from fedpet.pet.model import PetModel
from fedpet.protocol.plan import Plan
from fedpet.search import SearchModel
from fedpet.training.input_checks import settle_padding
from fedpet.utils.seeds import client_id64

__all__ = ["LoadedPlan", "ModelCache"]


@dataclass(frozen=True)
class LoadedPlan:
    """A plan with all that its training needs.

    Attributes:
        digest: Names the plan in messages.
        plan: The plan.
        pet: The adapted model; of a plan that searches, the whole search space.
        data: The node's rows, tokenised.
        rows_of: Client number -> indices of its rows that are trained on.
        held_out_of: Client number -> indices of its rows that are not.
        trainers: Of a script, which train in the place of fedpet's own loop; None has none.
    """

    digest: bytes
    plan: Plan
    pet: PetModel | SearchModel
    data: FederatedData
    rows_of: dict[int, np.ndarray]
    held_out_of: dict[int, np.ndarray] = field(default_factory=dict)
    trainers: ScriptTrainers | None = None

    @cached_property
    def codings(self) -> tuple[VectorCodec, ...]:
        """The codec of an update, by tier."""
        tiers = self.pet.tiers
        return tuple(self.plan.uplink(quantisation_groups(t), head_groups(t)) for t in tiers)

    def with_rows(self, data: FederatedData) -> LoadedPlan:
        """Return the same with a node's rows and clients."""
        return replace(
            self,
            data=data,
            rows_of={client_id64(client.id): client.rows for client in data.clients},
            held_out_of={client_id64(client.id): client.held_out for client in data.clients},
            trainers=None if self.trainers is None else self.trainers.with_rows(data),
        )


class ModelCache:
    """Load plans, one at a time.

    Args:
        config: The node's checkpoint, rows and device.
        plans: The store of plans.
    """

    def __init__(self, config: NodeConfig, plans: PlanStore) -> None:
        self._config = config
        self._plans = plans
        self._loaded: LoadedPlan | None = None
        self._files: list[tuple[int, ...]] = []  # that its rows are from, as they were then

    def load(self, digest: bytes) -> LoadedPlan:
        """Return a plan with its model and rows, loaded unless it is the one in force.

        Rows of the node's own are read again where their files have changed.

        Raises:
            PlanError: The plan is not stored here, or does not fit the checkpoint here.
            InputError: Checkpoint, rows or device cannot be used.
        """
        files = self._file_states()
        if self._loaded is not None and self._loaded.digest == digest and files != self._files:
            self._loaded = self._loaded.with_rows(self.load_rows(self._loaded.plan))
            self._files = files
        if self._loaded is None or self._loaded.digest != digest:
            self._files = files
            plan = self._config.read_plan(self._plans.get(digest))
            self._loaded = None  # free the old model before the new one is built
            gc.unfreeze()
            try:
                self._loaded = self._build(digest, plan)
            finally:  # all of it stays: no collection needs to look through it
                gc.freeze()
        return self._loaded

    def load_rows(self, plan: Plan) -> FederatedData:
        """Return this node's rows, tokenised as the plan says, and its clients.

        Raises:
            PlanError: The tokeniser is another than the plan's.
            DataError: The rows cannot be used.
        """
        config = self._config
        if config.load_rows is not None:
            return config.load_rows()
        rule, population = plan.evaluation, config.population
        if rule is not None:
            held_out, least = rule.fraction, rule.min_rows
            population = replace(population, eval_fraction=held_out, min_rows=least)
        elif population.eval_fraction:
            population = replace(population, eval_fraction=0.0)
        started = time.time() - 1  # a file system's clock may be behind
        data = load_data(
            replace(
                config.data,
                task=plan.task.kind,
                metric=plan.task.metric,
                metrics=plan.task.metrics,
                label_names=plan.task.label_names,
                max_length=plan.max_length,
                collator=plan.collator,
            ),
            population,
            locate(config.backbone),
            cache=config.cache,
            evaluation=False,
            all_rows=config.has_own_rows,
        )
        if config.own_cache:
            drop_unused(config.cache, started)
        if data.tokenizer_hash != plan.tokenizer_hash:
            raise PlanError(
                f"the tokeniser here is {data.tokenizer_hash:.16}, the plan's is "
                f"{plan.tokenizer_hash:.16}: start server and nodes from the same checkpoint."
            )
        if not config.client:
            return data
        clients = tuple(replace(client, id=config.client) for client in data.clients)
        return replace(data, clients=clients)

    def _file_states(self) -> list[tuple[int, ...]]:
        """Return what tells if a file of the node's own rows is another than it was."""
        if not self._config.has_own_rows:
            return []
        source = Path(self._config.data.source).expanduser()
        files = sorted(source.rglob("*")) if source.is_dir() else [source]
        states: list[tuple[int, ...]] = []
        for path in files:
            with contextlib.suppress(OSError):  # of a file that is gone: reading says so
                found = path.stat()
                states.append((found.st_ino, found.st_size, found.st_mtime_ns))
        return states

    def _build(self, digest: bytes, plan: Plan) -> LoadedPlan:
        data = self.load_rows(plan)
        backbone = load_for_task(
            plan.backbone(self._config.backbone),
            plan.task,
            device=check_device(self._config.device),
        )
        trainers = None
        if self._config.script is not None:
            trainers = ScriptTrainers(TrainerScript(self._config.script), data)
            backbone = trainers.adopt_model(backbone)
        settle_padding(backbone.model, data.train)
        pet = plan.build(backbone) if plan.search is None else plan.build_search(backbone)
        loaded = LoadedPlan(digest, plan, pet, data, {}).with_rows(data)
        return replace(loaded, trainers=trainers)
