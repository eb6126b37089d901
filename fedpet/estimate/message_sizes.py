"""Count the bytes of messages around payloads of given lengths, as the ledger does."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import msgspec
import numpy as np

from fedpet.codec import encode_positions
from fedpet.config import ClientEvaluation, Experiment
from fedpet.data import Task
from fedpet.estimate.participants import Participant
from fedpet.estimate.payload_simulation import Payloads
from fedpet.estimate.value_counts import Layout
from fedpet.pet.mask import mask_size
from fedpet.protocol.client_metric import SECTION_BYTES
from fedpet.protocol.frame import HEADER_BYTES
from fedpet.protocol.plan import Plan
from fedpet.protocol.registration import encode_registration
from fedpet.protocol.request import (
    SOME_CLIENT,
    EvaluationRequest,
    Path,
    Request,
    single_client_bytes,
    write_request,
)
from fedpet.utils.source_digest import package_versions

__all__ = [
    "frames_down",
    "made_up_plan",
    "measuring_bytes",
    "reply_bytes",
    "request_bytes",
    "roll_call_bytes",
]

_NAME = "client-1"  # as long as any
_SAMPLE = 1 << 22  # entries of a tensor whose positions are coded; of a larger one as many
_RATE = 0.012  # made up, of two digits


def reply_bytes(payload: int, *, measures: bool = False) -> int:
    """Return one client's reply, from the length of its payload; longer where it measures."""
    section = SECTION_BYTES if measures else 0
    return single_client_bytes(HEADER_BYTES + section + payload, reply=True)


def measuring_bytes(frames: int) -> tuple[int, int]:
    """Return what a client that measures alone receives and sends, from the values' frame."""
    request = EvaluationRequest((SOME_CLIENT,), b"")
    down = single_client_bytes(_length(request, frames, 0), reply=False)
    return down, single_client_bytes(HEADER_BYTES + SECTION_BYTES, reply=True)


def request_bytes(frames: int, plan: Plan, with_plan: int = 0) -> int:
    """Return the request for one client.

    Args:
        frames: Length of the frames with the values, or with changes of their reference.
        plan: Says what else a request names.
        with_plan: Length of the plan, where the client is sent it.
    """
    paths = (Path(1, 1 << 31),) if plan.is_delta_downlink else ()
    accepted = (0,) if plan.codec.error_feedback else ()
    run = 1 << 63 if paths or accepted else 0
    request = Request((SOME_CLIENT,), b"", run=run, paths=paths, accepted=accepted)
    return single_client_bytes(_length(request, frames, with_plan), reply=False)


def roll_call_bytes(plan_length: int) -> int:
    """Return what registering one real client takes, both ways: the plan, and one client's rows."""
    question = _length(Request((), b""), 0, plan_length)
    answer = len(encode_registration({_NAME: 1}, package_versions()))
    return single_client_bytes(question, reply=False) + single_client_bytes(answer, reply=True)


def frames_down(
    lengths: Payloads, rounds: Sequence[Sequence[Participant]], *, changes: bool
) -> list[list[float]]:
    """Return the bytes of the frames that each client of each round is sent.

    As fedpet/server/downlink.py: whoever holds the reference of an earlier round is sent the
    changes since, where these are shorter than the whole. Every client answers, so each holds the
    reference of its last round; all hold that of the checkpoint.

    Args:
        lengths: Of payloads.
        rounds: The clients of each.
        changes: Whether clients follow a reference.
    """
    frame, whole = lengths.down + HEADER_BYTES, lengths.whole + HEADER_BYTES  # (rounds, tiers)
    if not changes:
        return [[float(frame[r, t.tier]) for t in takers] for r, takers in enumerate(rounds)]
    until = np.vstack([np.zeros(frame.shape[1]), np.cumsum(frame, axis=0)])  # sums before a round
    known: dict[int, int] = {}  # client -> the round whose reference it holds, from 1
    sent = []
    for r, takers in enumerate(rounds):
        each = []
        for taker in takers:
            since = min(known.get(taker.client, 0), r)  # changes from here on are missed
            chain = float(until[r + 1, taker.tier] - until[since, taker.tier])
            each.append(chain if since == r else min(chain, float(whole[r, taker.tier])))
            known[taker.client] = r + 1
        sent.append(each)
    return sent


def _length(request: Request, frames: int, plan: int) -> int:
    """Length of a request with so many bytes of frames and plan."""
    frame, coded = (bytes(min(size, 1 << 16)) for size in (frames, plan))  # beyond, none is dearer
    whole = msgspec.structs.replace(request, frame=frame, plan=coded)
    return len(write_request(whole)) + frames + plan - len(frame) - len(coded)


def made_up_plan(experiment: Experiment, layout: Layout, task: Task) -> Plan:
    """Make the run's plan with made-up hashes, positions and tokeniser.

    Its hashes are made up: they compress like others, to a few bytes. So are learning rates that
    a run derives from its model: no payload depends on their size. Its positions are a random
    set as dense everywhere, which is the dearest of a density: where tensors differ, their
    entropies add up to less.
    """
    mask = experiment.mask if experiment.mask.enabled else None
    kinds = [kind for kind, _ in layout.tiers[-1]]
    positions = b""
    if mask is not None and mask.broadcast == "send":
        counts = layout.structure.mask
        density = mask.density if counts is None else counts.num_values / sum(layout.scope)
        positions = bytes(_positions_bytes(layout.scope, density))
    return Plan(
        fingerprint=_hash("fingerprint"),
        head_seed=experiment.backbone.head_seed,
        task=task,
        max_length=experiment.data.max_length,
        tokenizer_hash=_hash("tokenizer"),
        mask=mask,
        mask_sha256=_hash("mask") if mask is not None else "",
        mask_positions=positions,
        structure=layout.structure.to_broadcast(),
        num_values=layout.num_values,
        layout=_hash("layout"),
        codec=experiment.codec,
        training=experiment.training.settled(dict.fromkeys(kinds, _RATE)),
        num_rounds=experiment.strategy.num_rounds,
        seed=experiment.run.seed,
        head=experiment.backbone.head,
        dtype=experiment.backbone.dtype,
        bits=experiment.backbone.bits,
        evaluation=ClientEvaluation.of(experiment.clients),
    )


def _positions_bytes(scope: tuple[int, ...], density: float) -> int:
    """Return the size of coded positions where every tensor has the mask's density."""
    random = np.random.default_rng(0)
    total = 0.0
    for size, times in Counter(scope).items():
        sample = min(size, _SAMPLE)
        chosen = np.sort(random.choice(sample, mask_size(density, sample), replace=False))
        total += times * len(encode_positions([chosen], [sample])) * size / sample
    return round(total)


def _hash(of: str) -> str:
    return hashlib.sha256(of.encode()).hexdigest()
