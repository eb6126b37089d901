"""Answer a message on a node: its clients train or measure, or are registered.

In:  a request (fedpet/protocol/request.py): clients, the global values, the plan where the node
     may lack it.
Out: a frame a client with its update, or a refusal that says why there is none. A request without
     clients asks for the node's registration (fedpet/protocol/registration.py); one to measure
     alone is answered with the clients' metrics.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence

import torch
from flwr.app import Message

from fedpet.client.global_values import (
    TierValues,
    decode_global_values,
    decode_values_alone,
    frames_by_tier,
)
from fedpet.client.model_cache import LoadedPlan, ModelCache
from fedpet.client.node_config import NodeConfig
from fedpet.client.own_rows import measure_values
from fedpet.client.plan_store import PlanStore
from fedpet.client.refusal_reason import reason_for_server
from fedpet.client.state_store import StateStore, state_folder
from fedpet.client.train_client import Outcome, passes_of_all, train_client, train_together
from fedpet.errors import FrameError
from fedpet.pet.kernels.matmul import bound_onednn_cache
from fedpet.pet.tiers import largest_tier
from fedpet.protocol.frame import (
    Frame,
    Measured,
    Refusal,
    RefusalCode,
    StateMissingError,
    pack_frame,
    pack_measured,
    pack_refusal,
)
from fedpet.protocol.plan import Plan
from fedpet.protocol.registration import encode_registration
from fedpet.protocol.request import (
    EvaluationRequest,
    HeldValues,
    Request,
    from_record,
    read_request,
    to_record,
)
from fedpet.training.loop import count_examples
from fedpet.utils.source_digest import package_versions

__all__ = ["Node", "get_node", "reply"]

LOG = logging.getLogger("fedpet")
MAX_REFUSALS = 10_000  # of clients of one message that cannot be read at all


class Node:
    """Answer messages, with the plans, the model and the clients' state of one process.

    Args:
        config: The node's checkpoint, rows and cache.
    """

    def __init__(self, config: NodeConfig) -> None:
        bound_onednn_cache()
        self.config = config
        self.plans = PlanStore(config.cache, quota=config.disk_bytes)
        self.models = ModelCache(config, self.plans)
        self._state: StateStore | None = None
        # Of the last request, by their name and the run's.
        self._values: tuple[tuple[HeldValues, int], list[TierValues]] | None = None

    def answer(self, payload: bytes) -> bytes:
        """Train the clients that a request names.

        Args:
            payload: A request, see fedpet/protocol/request.py.

        Returns:
            One frame or refusal a client, joined, in the order of the request; a registration
            where the request names no client.

        Raises:
            FrameError: The request does not parse, or names a client twice; there is nobody to
                answer for.
        """
        request = read_request(payload)
        if not request.clients:
            return self._register(request.plan)
        if len(set(request.clients)) < len(request.clients):
            raise FrameError("a request names each client once: it would be trained as often.")
        frames = [] if (held := request.held) else frames_by_tier(request)
        if held is None:
            held = request.name_values(frames[-1][-1].plan_digest, frames[-1][-1].server_round)
        digest, server_round = held.digest, held.server_round
        try:
            if self.config.limits is not None:
                self.config.limits.check_request(len(request.clients))
            if request.plan:
                self._store(request.plan, digest)
            loaded = self.models.load(digest)
            if isinstance(request, EvaluationRequest):
                return self._measure(loaded, request, server_round, frames)
            _check_feedback(request, loaded.plan)
            state = self._open_state(digest, request.run)
            key = held, request.run
            if self._values is None or self._values[0] != key:
                if not frames:
                    raise StateMissingError(RefusalCode.VALUES_MISSING)
                self._values = None  # free the round before
                starts = decode_global_values(request, frames, loaded.plan, loaded.pet, state)
                self._values = key, starts
            starts = self._values[1]
            if request.which and max(request.which) >= len(starts):
                raise FrameError(
                    f"the request gives a client tier {max(request.which)}, counted from 0, and "
                    f"carries {len(starts)}."
                )
        except Exception as error:  # an OSError names its file; the round goes on
            code = self._unfit_code(error)
            return b"".join(
                self._refuse(digest, server_round, client, error, code)
                for client in request.clients[:MAX_REFUSALS]
            )
        torch.set_num_threads(self.config.threads or loaded.plan.training.threads)
        which = request.which or (0,) * len(request.clients)
        accepted = request.accepted or (0,) * len(request.clients)
        given = [starts[tier] for tier in which]
        ahead = _train_ahead(loaded, list(zip(request.clients, given, strict=True)), server_round)
        note = self._note_changed_rows(loaded, server_round)
        with passes_of_all(loaded):
            return note + b"".join(
                self._train(loaded, start, client, server_round, last, state, outcome)
                for client, start, last, outcome in zip(
                    request.clients, given, accepted, ahead, strict=True
                )
            )

    def _measure(
        self,
        loaded: LoadedPlan,
        request: EvaluationRequest,
        server_round: int,
        frames: Sequence[Sequence[Frame]],
    ) -> bytes:
        """Measure the values of a request on each of its clients' rows; nothing is trained.

        Raises:
            FrameError: The values are not as such a request has them.
        """
        [start] = decode_values_alone(request, frames, loaded.plan, loaded.pet)
        torch.set_num_threads(self.config.threads or loaded.plan.training.threads)
        answers = []
        for client in request.clients:
            try:
                if client not in loaded.rows_of:
                    raise FrameError("this client does not live on this node.")
                metric = measure_values(loaded, start, client)
                measured = Measured(loaded.digest, server_round, client, metric)
                answers.append(pack_measured(measured))
            except Exception as error:  # refuse this client alone
                answers.append(self._refuse(loaded.digest, server_round, client, error))
        return b"".join(answers)

    def _register(self, plan: bytes) -> bytes:
        """List the node's clients and their rows, read and tokenised as the plan asks.

        The checkpoint is loaded too: a node that has another one takes no part.
        """
        digest = Plan.digest(plan)
        try:
            self._store(plan, digest)
            registration = _registration_of(self.models.load(digest))
            self.plans.keep_registration(digest, registration)
        except Exception as error:
            return self._refuse(digest, 0, 0, error, self._unfit_code(error))
        return registration

    def _store(self, plan: bytes, digest: bytes) -> None:
        """Read a plan within the device's limits, and store it."""
        self.config.read_plan(plan)
        self.plans.put(plan, digest)

    def _note_changed_rows(self, loaded: LoadedPlan, server_round: int) -> bytes:
        """Return a note that the node's rows are others than it registered; b"" where they are."""
        registered = self.plans.registration(loaded.digest)
        if not self.config.has_own_rows or registered in (b"", _registration_of(loaded)):
            return b""
        LOG.info("the rows have changed since this node registered: it registers again.")
        reason = "its rows have changed since it registered."
        note = Refusal(loaded.digest, server_round, 0, reason, RefusalCode.ROWS_CHANGED)
        return pack_refusal(note)

    def _unfit_code(self, error: Exception) -> RefusalCode:
        """Return the code of an error that keeps the whole node from taking part, and log it."""
        if isinstance(error, FrameError | StateMissingError):  # of the request
            return RefusalCode.OTHER
        if self.config.has_own_rows:  # a real node, whose owner reads its log
            LOG.error("this node cannot take part until this is mended: %s", error)
        return RefusalCode.NODE_UNFIT

    def _refuse(
        self,
        digest: bytes,
        server_round: int,
        client: int,
        error: Exception,
        code: RefusalCode = RefusalCode.OTHER,
    ) -> bytes:
        """Pack an error as a client's refusal."""
        code = error.code if isinstance(error, StateMissingError) else code
        own_rows = self.config.has_own_rows
        reason = reason_for_server(error, client, own_rows=own_rows)
        return pack_refusal(Refusal(digest, server_round, client, reason, code))

    def _train(
        self,
        loaded: LoadedPlan,
        start: TierValues,
        client: int,
        server_round: int,
        accepted: int,
        state: StateStore | None,
        outcome: Outcome | None,
    ) -> bytes:
        digest, mask = loaded.digest, loaded.plan.mask
        if client not in loaded.rows_of:
            reason = "this client does not live on this node."
            return pack_refusal(Refusal(digest, server_round, client, reason))
        try:
            rule = loaded.plan.evaluation
            if rule is not None and rule.is_unseen(client):
                raise FrameError("this client never trains, by clients.unseen-fraction.")
            own = self.config.max_density
            if own is not None and mask and (tier := largest_tier(mask, own)) != start.tier:
                code, density = RefusalCode.OTHER_TIER, mask.tier_densities[tier]
                reason = f"this node's tier is of density {density!r}"
                return pack_refusal(Refusal(digest, server_round, client, reason, code, density))
            residual = None
            if state is not None and accepted:
                count = len(start.values)
                residual = state.accepted_residual(client, server_round, accepted, count)
            frame, residual = train_client(loaded, start, client, server_round, residual, outcome)
            if state is not None and residual is not None:
                state.keep_residual(client, server_round, residual, accepted=accepted)
            return pack_frame(frame)
        except Exception as error:  # refuse this client alone: the others train
            return self._refuse(digest, server_round, client, error)

    def _open_state(self, digest: bytes, run: int) -> StateStore | None:
        """Return the state of a run; None where its messages name none, since none is needed."""
        if not run:
            return None
        folder = state_folder(self.config.cache, digest, run)
        if self._state is None or self._state.folder != folder:
            self._state = StateStore(folder, quota=self.config.disk_bytes)
        return self._state


@functools.lru_cache(maxsize=1)
def get_node(config: NodeConfig) -> Node:
    """Return this process's node, made at the first message."""
    return Node(config)


def reply(message: Message, config: NodeConfig) -> Message:
    """Answer a Flower message, as a ClientApp's handlers do."""
    answer = get_node(config).answer(from_record(message.content))
    return Message(to_record(answer), reply_to=message)


def _train_ahead(
    loaded: LoadedPlan, clients: Sequence[tuple[int, TierValues]], server_round: int
) -> Iterator[Outcome | None]:
    """Yield the outcome of each client that is trained with others; None of one to train alone.

    So many as the plan says are trained when the first of them is asked for.
    """
    size = loaded.plan.training.clients_at_once
    for first in range(0, len(clients), size):
        batch = clients[first : first + size]
        outcomes = train_together(loaded, batch, server_round) if len(batch) > 1 else {}
        for client, _ in batch:
            yield outcomes.pop(client, None)


def _check_feedback(request: Request, plan: Plan) -> None:
    if bool(request.accepted and request.run) != plan.codec.error_feedback:
        raise FrameError(
            f"the plan's error feedback is {plan.codec.error_feedback!r}, and the request names "
            f"{len(request.accepted)} accepted rounds."
        )


def _registration_of(loaded: LoadedPlan) -> bytes:
    examples = count_examples(loaded.data, loaded.plan.task)
    return encode_registration(examples, package_versions())
