"""What a payload weighs as a message: frame, request and Flower's own framing around it.

    outline -> layout -> draws -> rules -> updates -> downlink -> [messages] -> cost

In:  lengths of payloads, and the run's plan, its hashes made up.
Out: bytes, as the ledger counts them.

Messages are Flower's, serialised around random bytes. Flower cuts an array into chunks of a few
MiB, each with a header of its own; long ones are reckoned from the headers of short ones.
"""

from __future__ import annotations

import hashlib
from collections import Counter

import msgspec
import numpy as np
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE as CHUNK_BYTES

from fedpet.codec import encode_positions
from fedpet.config import Experiment
from fedpet.data import Task
from fedpet.estimate.value_counts import Layout
from fedpet.pet.mask import mask_size
from fedpet.pet.structure import Structure
from fedpet.protocol.frame import HEADER_BYTES
from fedpet.protocol.plan import Plan
from fedpet.protocol.registration import encode_registration
from fedpet.protocol.request import (
    SOME_CLIENT,
    Path,
    Request,
    single_client_bytes,
    write_request,
)

__all__ = ["made_up_plan", "message_bytes", "reply_bytes", "request_bytes", "roll_call_bytes"]

_NAME = "client-1"  # as long as any
_SAMPLE = 1 << 22  # entries of a tensor whose positions are coded; of a larger one as many


def reply_bytes(payload: int) -> int:
    """One client's reply, from the length of its payload."""
    return message_bytes(HEADER_BYTES + payload, reply=True)


def request_bytes(frames: int, plan: Plan, with_plan: int = 0) -> int:
    """The request for one client.

    Args:
        frames: Length of the frames with the values, or with changes of their reference.
        plan: Says what else a request names.
        with_plan: Length of the plan, where the client is sent it.
    """
    paths = (Path(1, 1 << 31),) if plan.is_delta_downlink else ()
    accepted = (0,) if plan.codec.error_feedback else ()
    run = 1 << 63 if paths or accepted else 0
    request = Request((SOME_CLIENT,), b"", run=run, paths=paths, accepted=accepted)
    return message_bytes(_length(request, frames, with_plan), reply=False)


def roll_call_bytes(plan_length: int) -> int:
    """What asking one real client for its rows takes, both ways: the plan, and a roster of one."""
    question = _length(Request((), b""), 0, plan_length)
    answer = len(encode_registration({_NAME: 1}))
    return message_bytes(question, reply=False) + message_bytes(answer, reply=True)


def _length(request: Request, frames: int, plan: int) -> int:
    """Length of a request with so many bytes of frames and plan."""
    frame, coded = (bytes(min(size, 1 << 16)) for size in (frames, plan))  # beyond, none is dearer
    whole = msgspec.structs.replace(request, frame=frame, plan=coded)
    return len(write_request(whole)) + frames + plan - len(frame) - len(coded)


def message_bytes(count: int, *, reply: bool) -> int:
    """What a message with one array of `count` bytes weighs to or from one device alone."""
    if count <= 2 * CHUNK_BYTES:
        return single_client_bytes(_noise(count), reply=reply)
    one, two = (single_client_bytes(_noise(n * CHUNK_BYTES), reply=reply) for n in (1, 2))
    framing = two - 2 * CHUNK_BYTES
    each = framing - (one - CHUNK_BYTES)
    return count + framing + each * (-(-count // CHUNK_BYTES) - 2)


def made_up_plan(experiment: Experiment, layout: Layout, task: Task) -> Plan:
    """The run's plan, but for what hangs on weights and tokeniser.

    Its hashes are made up: they compress like others, to a few bytes. Its positions are a random
    set as dense everywhere, which is the dearest of a density: where tensors differ, their
    entropies add up to less.
    """
    mask = experiment.mask if experiment.mask.enabled else None
    positions = b""
    if mask is not None and mask.broadcast == "explicit":
        positions = bytes(_positions_bytes(layout.scope, mask.density))
    return Plan(
        fingerprint=_hash("fingerprint"),
        head_seed=experiment.backbone.head_seed,
        task=task,
        max_length=experiment.data.max_length,
        tokenizer_hash=_hash("tokenizer"),
        mask=mask,
        mask_sha256=_hash("mask") if mask is not None else "",
        mask_positions=positions,
        structure=Structure(layout.structure.modules),
        num_values=layout.num_values,
        layout=_hash("layout"),
        codec=experiment.codec,
        training=experiment.training,
        num_rounds=experiment.strategy.num_rounds,
        seed=experiment.run.seed,
        head=experiment.backbone.head,
    )


def _positions_bytes(scope: tuple[int, ...], density: float) -> int:
    """What coded positions take where every tensor has the mask's density."""
    random = np.random.default_rng(0)
    total = 0.0
    for size, times in Counter(scope).items():
        sample = min(size, _SAMPLE)
        count = mask_size(density, sample)
        chosen = np.sort(random.choice(sample, count, replace=False, shuffle=False))
        total += times * len(encode_positions([chosen], [sample])) * size / sample
    return round(total)


def _noise(count: int) -> bytes:
    return np.random.default_rng(0).bytes(count)


def _hash(of: str) -> str:
    return hashlib.sha256(of.encode()).hexdigest()
