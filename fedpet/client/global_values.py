"""Decode the global values of each tier in a request.

In:  a request's frames; the plan; the node's state of the run.
Out: for each tier in it, float32 values, the same bits on every node (law 6).

Either each tier's values come coded in one frame, or they are the public reference, and come as
the reference itself or as the changes since one that the node holds
(fedpet/protocol/shared_reference.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedpet.client.state_store import StateStore
from fedpet.codec import VectorCodec
from fedpet.config import MAX_TIERS
from fedpet.errors import FrameError
from fedpet.pet.layout import Communicated, head_groups, quantisation_groups
from fedpet.protocol.codec_seeds import downlink_seed
from fedpet.protocol.frame import Frame, RefusalCode, StateMissingError, unpack_frames
from fedpet.protocol.plan import Plan
from fedpet.protocol.request import EvaluationRequest, Path, Request
from fedpet.protocol.shared_reference import Reference, apply_changes, decode_full

__all__ = ["TierValues", "decode_global_values", "decode_values_alone", "frames_by_tier"]


@dataclass(frozen=True)
class TierValues:
    """A tier, and the global values of it: the start of a client's training."""

    tier: int
    values: np.ndarray


def frames_by_tier(request: Request) -> list[list[Frame]]:
    """Return a request's frames by tier, the last of each tier of the request's round.

    Raises:
        FrameError: They are not of one plan and that round, or not as many as the request says.
    """
    sizes = [max(path.changes, 1) for path in request.paths]
    most = sum(sizes) if sizes else MAX_TIERS
    frames: list[Frame] = []
    packed = request.frame
    for part in unpack_frames(packed, max_frames=most, max_payload_bytes=len(packed)):
        if not isinstance(part, Frame) or part.client:
            raise FrameError("a request carries frames of global values, got a client's.")
        frames.append(part)
    sizes = sizes or [1] * len(frames)
    if not frames or len(frames) != sum(sizes):
        raise FrameError(f"the request announces {sum(sizes)} frames, and carries {len(frames)}.")
    stops = np.cumsum(sizes).tolist()
    tiers = [frames[stop - size : stop] for stop, size in zip(stops, sizes, strict=True)]
    digest, server_round = frames[-1].plan_digest, frames[-1].server_round
    for tier in tiers:
        first = server_round - len(tier) + 1
        if [frame.server_round for frame in tier] != list(range(first, server_round + 1)) or {
            (frame.plan_digest, frame.count) for frame in tier
        } != {(digest, tier[0].count)}:
            raise FrameError(
                f"a request carries frames of one plan and one round, or of the rounds before it "
                f"without a gap, got {len(tier)} frames of others."
            )
    return tiers


def decode_global_values(
    request: Request,
    frames: Sequence[Sequence[Frame]],
    plan: Plan,
    pet: Communicated,
    state: StateStore | None,
) -> list[TierValues]:
    """Decode the global values of each tier, known by how many they are.

    Raises:
        FrameError: A frame is not as the plan says.
        StateMissingError: The changes are of a reference that is not held here.
    """
    if bool(request.paths and state) != plan.is_delta_downlink:
        raise FrameError(
            f"the plan's downlink is {plan.codec.downlink_mode!r} by {plan.codec.downlink!r}, "
            f"the request's is {'delta' if request.paths else 'full'!r}."
        )
    counts = [sum(segment.size for segment in layout) for layout in pet.tiers]
    starts = []
    for index, parts in enumerate(frames):
        frame = parts[-1]
        whole = bool(request.paths) and not request.paths[index].changes
        if frame.count not in counts or (not whole and frame.codec != plan.codec.downlink):
            raise FrameError(
                f"the plan sends {' or '.join(map(str, counts))} values by "
                f"{plan.codec.downlink!r}, "
                f"the frame holds {frame.count} by {frame.codec!r}."
            )
        tier = counts.index(frame.count)
        layout = pet.tiers[tier]
        coding = plan.downlink(quantisation_groups(layout), head_groups(layout))
        if request.paths and state is not None:
            path = request.paths[index]
            values = _reference(path, parts, tier, coding, plan.seed, state).values
        else:
            seed = downlink_seed(plan.seed, frame.server_round)
            values = coding.decode(frame.payload, seed=seed)
        starts.append(TierValues(tier, values))
    return starts


def decode_values_alone(
    request: EvaluationRequest,
    frames: Sequence[Sequence[Frame]],
    plan: Plan,
    pet: Communicated,
) -> list[TierValues]:
    """Decode values that are measured and not trained from: coded in full, of no reference.

    Raises:
        FrameError: The request has more than one frame, or one that is not as the plan says.
    """
    if request.paths or request.run or request.which or len(frames) != 1:
        raise FrameError(f"values to measure come in one frame, the request has {len(frames)}.")
    full = replace(plan, codec=replace(plan.codec, downlink_mode="full"))
    return decode_global_values(request, frames, full, pet, None)


def _reference(
    path: Path,
    frames: Sequence[Frame],
    tier: int,
    coding: VectorCodec,
    seed: int,
    state: StateStore,
) -> Reference:
    """Return the round's reference by the request's path, and store it for the next round."""
    count = coding.count
    if not path.changes:
        reference = decode_full(frames[0], count)
        if reference.checksum != path.checksum:
            raise FrameError("the reference does not have the checksum that the request names.")
    else:
        places = (
            lambda: state.reference_in_memory(tier),
            lambda: state.reference_on_disk(tier, count),
            lambda: Reference.start(count),
        )
        followed = apply_changes(places, frames, coding, run_seed=seed, checksum=path.checksum)
        if followed is None:
            raise StateMissingError(RefusalCode.REFERENCE_MISSING)
        reference = followed
    state.keep_reference(tier, reference)
    return reference
