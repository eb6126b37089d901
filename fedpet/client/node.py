"""What a node does with a message: train its clients from the global values, and answer.

    ... -> codec -> plan -> [client] -> strategy -> ledger -> report

In:  a request (fedpet/protocol/request.py): a cohort, the global values, the plan where it may be
     lacking.
     A plan that searches is followed by the steps of fedpet/search/on_client.py instead of
     training.
Out: a frame a client with its update, or a refusal that says why there is none. A request without a
     cohort asks who lives here, and is answered with a roster (fedpet/protocol/registration.py).

What is heavy stays where it is: the backbone, its tokenised rows and the adapted model live as
long as the process does, plans lie on disk under their digest. A client is a few kilobytes of
values written into the resident model, and read out again.
"""

from __future__ import annotations

import functools
import gc
import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from flwr.app import Message

from fedpet.backbone.device import check_device
from fedpet.backbone.pretrained import load_for_task, locate
from fedpet.client.global_values import Start, decode_global_values, frames_by_tier
from fedpet.client.node_config import NodeSettings
from fedpet.client.residuals import Residuals
from fedpet.client.state_store import NodeState, state_folder
from fedpet.codec import encode_with_feedback
from fedpet.data import FederatedData, load_data
from fedpet.errors import ConfigError, FedpetError, FrameError, PlanError, ReplyError, TrainingError
from fedpet.pet.layout import head_groups, quantisation_groups
from fedpet.pet.model import PetModel
from fedpet.pet.tiers import largest_tier
from fedpet.protocol.frame import Frame, Refusal, pack_frame, pack_refusal
from fedpet.protocol.plan import Plan
from fedpet.protocol.registration import encode_registration
from fedpet.protocol.request import OTHER_TIER, PLAN_MISSING, from_record, read_request, to_record
from fedpet.search import SearchModel, client_config
from fedpet.training.input_checks import settle_padding
from fedpet.training.loop import TrainResult, train_rows
from fedpet.utils.atomic_write import atomic_write, untouched
from fedpet.utils.seeds import client_id64, derive_seed

MAX_REASON_BYTES = 500
KEPT_SECONDS = 90 * 24 * 3600.0  # of a plan that no message asked for

LOG = logging.getLogger("fedpet")

Model = PetModel | SearchModel  # of a plan that trains, and of one that searches


@dataclass(frozen=True)
class LoadedPlan:
    """What stays in memory from message to message: all that the plan in force needs."""

    digest: bytes
    plan: Plan
    pet: Model
    data: FederatedData
    rows_of: dict[int, np.ndarray]


class Node:
    """One process's resident state: plans, rows, and the model adapted to the plan in force."""

    def __init__(self, settings: NodeSettings) -> None:
        self.settings = settings
        self._resident: LoadedPlan | None = None
        self._state: NodeState | None = None

    def answer(self, payload: bytes) -> bytes:
        """Train the cohort that a request names.

        Args:
            payload: A request, see fedpet/protocol/request.py.

        Returns:
            One frame or refusal a client, joined, in the order of the request; a roster where the
            request names no client.

        Raises:
            FrameError: The request does not parse; there is nobody to answer for.
        """
        request = read_request(payload)
        if not request.clients:
            return self._roster(request.plan)
        frames = frames_by_tier(request)
        digest, server_round = frames[-1][-1].plan_digest, frames[-1][-1].server_round
        try:
            if request.plan:
                self._store(request.plan, digest)
            resident = self._prepare(digest)
            plan = resident.plan
            if bool(request.accepted and request.run) != plan.codec.error_feedback:
                raise FrameError(
                    f"the plan's error feedback is {plan.codec.error_feedback!r}, and the request "
                    f"names {len(request.accepted)} accepted rounds."
                )
            state = self._state_of(digest, request.run)
            starts = decode_global_values(request, frames, plan, resident.pet, state)
            if request.which and max(request.which) >= len(starts):
                raise FrameError(
                    f"the request gives a client tier {max(request.which)}, counted from 0, and "
                    f"carries {len(starts)}."
                )
        except (FedpetError, OSError) as error:  # its disk's too: by name, and the round goes on
            return b"".join(
                _refusal(digest, server_round, client, str(error)) for client in request.clients
            )
        torch.set_num_threads(self.settings.profile.threads or plan.training.threads)
        which = request.which or (0,) * len(request.clients)
        accepted = request.accepted or (0,) * len(request.clients)
        return b"".join(
            self._train(resident, starts[tier], Residuals(state, client, server_round, last))
            for client, tier, last in zip(request.clients, which, accepted, strict=True)
        )

    def _roster(self, plan: bytes) -> bytes:
        """Say who lives here: the rows are read and tokenised as the plan asks, and counted."""
        digest = Plan.digest(plan)
        try:
            self._store(plan, digest)
            data = self._data(Plan.from_bytes(plan))
            return encode_registration({client.id: len(client.rows) for client in data.clients})
        except (FedpetError, OSError) as error:
            return _refusal(digest, 0, 0, str(error))

    def _train(self, resident: LoadedPlan, start: Start, residuals: Residuals) -> bytes:
        """One client: write the values in, train, read them out, pack the difference."""
        digest, plan, pet = resident.digest, resident.plan, resident.pet
        client, server_round = residuals.client, residuals.server_round
        if client not in resident.rows_of:
            return _refusal(digest, server_round, client, "this client does not live on this node.")
        try:
            if start.tier != (own := self._tier(plan, start.tier)):
                density = plan.mask.tier_densities[own] if plan.mask is not None else 0.0
                return _refusal(digest, server_round, client, f"{OTHER_TIER}{density!r}")
            seed = derive_seed("client", plan.seed, server_round, client)
            pet.set_tier(start.tier)
            residual = residuals.last(pet.num_values)
            pet.load_values(torch.from_numpy(start.values), seed=seed)
            trained = _moved(resident, client, server_round, seed)
            update = pet.values().numpy() - start.values  # (values of the tier,)
            if not np.isfinite(update).all():
                raise TrainingError(
                    "the trained values hold NaN or infinity: lower training.learning-rate."
                )
            coding = plan.uplink(quantisation_groups(pet.segments), head_groups(pet.segments))
            encode_seed = derive_seed("encode", seed)
            if plan.codec.error_feedback:
                payload, left = encode_with_feedback(update, residual, coding, seed=encode_seed)
                residuals.keep(left)
            else:
                payload = coding.encode(update, seed=encode_seed)
        except Exception as error:  # this client's alone: the others of the cohort train
            return _refusal(digest, server_round, client, _reason(error, client))
        return pack_frame(
            Frame(
                plan_digest=digest,
                server_round=server_round,
                client=client,
                codec=plan.codec.uplink,
                count=pet.num_values,
                num_examples=trained.num_examples,
                loss=trained.loss,
                train_seconds=trained.train_seconds,
                payload=payload,
            )
        )

    def _tier(self, plan: Plan, asked: int) -> int:
        """The tier that this node trains: its own where it names one, else what it is asked for."""
        if self.settings.max_density is None:
            return asked
        return largest_tier(plan.mask, self.settings.max_density)

    def _state_of(self, digest: bytes, run: int) -> NodeState | None:
        """What is kept of a run; None where its messages name none, since nothing need be."""
        if not run:
            return None
        folder = state_folder(self.settings.cache, digest, run)
        if self._state is None or self._state.folder != folder:
            self._state = NodeState(folder)
        return self._state

    def _prepare(self, digest: bytes) -> LoadedPlan:
        """Make the plan of a request the one in force, unless it is already."""
        if self._resident is None or self._resident.digest != digest:
            stored = self._stored(digest)
            if stored is None:
                raise PlanError(PLAN_MISSING)
            plan = Plan.from_bytes(stored)
            self._resident = None  # the old model goes before the new one comes
            gc.unfreeze()
            try:
                self._resident = self._built(digest, plan)
            finally:  # it all stays: neither training nor the process's end looks through it
                gc.freeze()
        return self._resident

    def _built(self, digest: bytes, plan: Plan) -> LoadedPlan:
        data = self._data(plan)
        backbone = load_for_task(
            plan.backbone(self.settings.backbone),
            plan.task,
            device=check_device(self.settings.device),
        )
        settle_padding(backbone.model, data.train)
        rows_of = {client_id64(client.id): client.rows for client in data.clients}
        pet = plan.build(backbone) if plan.search is None else plan.build_search(backbone)
        return LoadedPlan(digest, plan, pet, data, rows_of)

    def _data(self, plan: Plan) -> FederatedData:
        """This node's rows, tokenised as the plan says, and its clients."""
        settings = self.settings
        data = load_data(
            replace(settings.data, label_names=plan.task.label_names, max_length=plan.max_length),
            settings.population,
            locate(settings.backbone),
            cache=settings.cache,
            evaluation=False,
            all_rows=settings.profile.has_own_rows,
        )
        if data.tokenizer_hash != plan.tokenizer_hash:
            raise PlanError(
                f"the tokeniser here is {data.tokenizer_hash:.16}, the plan's is "
                f"{plan.tokenizer_hash:.16}: start server and nodes from the same checkpoint."
            )
        return settings.profile.named(data)

    def _store(self, plan: bytes, digest: bytes) -> None:
        """Keep a plan on disk under its digest, whole or not at all."""
        if Plan.digest(plan) != digest:
            raise PlanError("the plan's bytes do not have the digest that the frame names.")
        if self._stored(digest) is None:
            path = self._plan_path(digest)
            path.parent.mkdir(parents=True, exist_ok=True)
            for old in untouched(path.parent.iterdir(), KEPT_SECONDS):
                old.unlink(missing_ok=True)
            atomic_write(path, plan, durable=True, shared=True)

    def _stored(self, digest: bytes) -> bytes | None:
        """The plan of a digest, if it lies here undamaged."""
        path = self._plan_path(digest)
        try:
            plan = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        return plan if Plan.digest(plan) == digest else None

    def _plan_path(self, digest: bytes) -> Path:
        return self.settings.cache / "plans" / f"{digest.hex()}.plan"


def _moved(resident: LoadedPlan, client: int, server_round: int, seed: int) -> TrainResult:
    """Move the model as the plan's rounds do: train, or search."""
    plan, pet, data = resident.plan, resident.pet, resident.data
    rows = resident.rows_of[client]
    if isinstance(pet, SearchModel):
        assert plan.search is not None
        config = client_config(plan.search, client)
        return pet.search_rows(
            data.train, rows, plan.task, config, server_round=server_round,
            logit_adjustment=plan.training.logit_adjustment, loss=plan.training.loss,
        )  # fmt: skip
    return train_rows(
        pet.model,
        pet.parameter_groups(),
        data.train,
        rows,
        plan.task,
        plan.training,
        seed=seed,
        progress=plan.progress(server_round),
        after_step=pet.after_step,
        sent=pet.sent_values(),
    )


@functools.lru_cache(maxsize=1)
def get_node(settings: NodeSettings) -> Node:
    """This process's node, made at the first message and kept."""
    return Node(settings)


def _reason(error: Exception, client: int) -> str:
    """Why a client has no update. What torch says may quote rows: it stays in this node's log."""
    if isinstance(error, (ReplyError, ConfigError, FloatingPointError, OSError)):
        return str(error)
    LOG.warning("client %016x was not trained", client, exc_info=error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return "memory ran out as it trained: lower training.batch-size or data.max-length."
    return f"its training failed with {type(error).__name__}: the node's log says where, and why."


def _refusal(digest: bytes, server_round: int, client: int, reason: str) -> bytes:
    short = reason.encode()[:MAX_REASON_BYTES].decode(errors="ignore")
    return pack_refusal(Refusal(digest, server_round, client, short))


def reply(message: Message, settings: NodeSettings) -> Message:
    """Answer a message: what a ClientApp's handlers call."""
    answer = get_node(settings).answer(from_record(message.content))
    return Message(to_record(answer), reply_to=message)
