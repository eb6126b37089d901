"""Encode the global values for a receiver: the values themselves, or changes of a shared reference.

In:  the global values, round by round; a tier, and the round of the reference that a receiver has.
Out: packed frames, from which the receiver has the values that the tier's clients start from.

`Values` codes the values anew each round. `Changes` moves one reference a tier in every round,
whoever takes part (fedpet/protocol/shared_reference.py): the reference that a receiver has decides
the bytes it is sent, and not the values it ends up with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedpet.errors import FrameError, RunError
from fedpet.pet.tiers import Tier
from fedpet.protocol.codec_seeds import downlink_seed
from fedpet.protocol.frame import Frame, pack_frame, unpack_frames
from fedpet.protocol.plan import Plan
from fedpet.protocol.request import Path
from fedpet.protocol.shared_reference import FULL_CODEC, Reference, encode_full

__all__ = ["Changes", "Downlink", "Sent", "Values", "downlink_of"]

MAX_CHANGES = 0xFFFF  # of a request, which counts them in 16 bits


@dataclass(frozen=True)
class Sent:
    """Frames for one receiver and tier.

    Attributes:
        frames: Packed, joined.
        path: Changes that lead to the reference; None where the frame is the values themselves.
    """

    frames: bytes
    path: Path | None = None


class Values:
    """Code the values themselves, anew each round: a receiver needs nothing of earlier rounds."""

    def __init__(self, plan: Plan, digest: bytes, tiers: Sequence[Tier]) -> None:
        self._plan, self._digest, self._tiers = plan, digest, tiers
        self._frames: dict[int, bytes] = {}  # tier -> the round's
        self._round, self._values = 0, np.empty(0, dtype=np.float32)

    def begin(self, server_round: int, values: np.ndarray) -> None:
        """Begin a round with its global values, float32, (num_values,)."""
        self._round, self._values, self._frames = server_round, values, {}

    def to(self, tier: int, held: int) -> Sent:
        """Return the round's frame, the same for every receiver of a tier.

        Args:
            tier: Index into the tiers.
            held: Round of the reference that the receiver has; 0 is the checkpoint.
        """
        if tier not in self._frames:
            its = self._tiers[tier]
            coding = self._plan.downlink(its.groups, its.head_groups)
            seed = downlink_seed(self._plan.seed, self._round)
            payload = coding.encode(self._values[its.where], seed=seed)
            self._frames[tier] = _pack(self._digest, self._round, coding.codec, its.count, payload)
        return Sent(self._frames[tier])

    def state(self) -> dict[str, np.ndarray]:
        """Return what a resumed run needs: nothing."""
        return {}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Go back to a `state`."""


class Changes:
    """Move one public reference a tier each round, by the coded change.

    Changes of past rounds are kept as long as together they are shorter than a reference that
    cannot be compressed.
    """

    def __init__(self, plan: Plan, digest: bytes, tiers: Sequence[Tier]) -> None:
        self._plan, self._digest = plan, digest
        self._lines = [_Line(plan, digest, tier) for tier in tiers]

    def begin(self, server_round: int, values: np.ndarray) -> None:
        """Move every reference towards the values of a round, float32, (num_values,)."""
        for line in self._lines:
            line.move(server_round, values)

    def to(self, tier: int, held: int) -> Sent:
        """Return the changes since a receiver's reference, or the whole one if that is shorter."""
        return self._lines[tier].to(held)

    def state(self) -> dict[str, np.ndarray]:
        """Return what a resumed run needs: references, and the changes of past rounds."""
        state: dict[str, np.ndarray] = {}
        for index, line in enumerate(self._lines):
            state |= {f"{name}-{index}": array for name, array in line.state().items()}
        return state

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Go back to a `state`.

        Raises:
            RunError: It is not of this plan.
        """
        for index, line in enumerate(self._lines):
            names = ("round", "reference", "changes")
            line.load_state({name: state[f"{name}-{index}"] for name in names})


Downlink = Values | Changes


def downlink_of(plan: Plan, digest: bytes, tiers: Sequence[Tier]) -> Downlink:
    """Return the downlink that a plan names."""
    return (Changes if plan.is_delta_downlink else Values)(plan, digest, tiers)


class _Line:
    """Keep one tier's reference and the changes that led there."""

    def __init__(self, plan: Plan, digest: bytes, tier: Tier) -> None:
        self._seed, self._digest, self._tier = plan.seed, digest, tier
        self._coding = plan.downlink(tier.groups, tier.head_groups)
        self._reference = Reference.start(tier.count)
        self._changes: list[bytes] = []  # the frames of the last rounds, up to the reference's
        self._whole = b""

    def move(self, server_round: int, values: np.ndarray) -> None:
        before = self._reference
        if server_round == before.server_round:
            return  # the same round once more: its change stands
        if server_round != before.server_round + 1:
            raise RunError(
                f"the reference is of round {before.server_round}, and round {server_round} "
                "begins: a run that goes on needs the wire's part of its journal."
            )
        change = values[self._tier.where] - before.values
        payload = self._coding.encode(change, seed=downlink_seed(self._seed, server_round))
        decoded = self._coding.decode(payload, seed=downlink_seed(self._seed, server_round))
        self._reference = before.moved(decoded)
        self._whole = b""
        self._changes.append(self._pack(self._coding.codec, payload))
        most = 4 * self._tier.count + 1024
        while sum(map(len, self._changes)) > most or len(self._changes) > MAX_CHANGES:
            del self._changes[0]

    def to(self, held: int) -> Sent:
        checksum = self._reference.checksum
        missed = max(self._reference.server_round - held, 1)
        if missed <= len(self._changes):
            frames = b"".join(self._changes[-missed:])
            if missed == 1 or len(frames) <= len(self._packed_whole()):
                return Sent(frames, Path(missed, checksum))
        return Sent(self._packed_whole(), Path(0, checksum))

    def _packed_whole(self) -> bytes:
        if not self._whole:
            self._whole = self._pack(FULL_CODEC, encode_full(self._reference))
        return self._whole

    def _pack(self, codec: str, payload: bytes) -> bytes:
        server_round, count = self._reference.server_round, self._tier.count
        return _pack(self._digest, server_round, codec, count, payload)

    def state(self) -> dict[str, np.ndarray]:
        return {
            "round": np.array([self._reference.server_round], dtype=np.int64),
            "reference": self._reference.values,
            "changes": np.array(bytearray(b"".join(self._changes)), dtype=np.uint8),
        }

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        [server_round], values = state["round"].tolist(), state["reference"]
        try:
            frames = list(
                unpack_frames(
                    state["changes"].tobytes(), max_frames=MAX_CHANGES, max_payload_bytes=1 << 32
                )
            )
        except FrameError as error:
            raise RunError(f"the journal's changes of the reference do not read: {error}") from None
        rounds = [frame.server_round for frame in frames]
        if (
            values.shape != (self._tier.count,)
            or rounds != list(range(server_round - len(rounds) + 1, server_round + 1))
            or any(frame.plan_digest != self._digest for frame in frames)
        ):
            raise RunError("the journal's reference is of another plan: start the run anew.")
        self._reference = Reference(server_round, values.astype(np.float32))
        self._changes = [pack_frame(frame) for frame in frames if isinstance(frame, Frame)]
        self._whole = b""


def _pack(digest: bytes, server_round: int, codec: str, count: int, payload: bytes) -> bytes:
    return pack_frame(
        Frame(
            plan_digest=digest,
            server_round=server_round,
            client=0,
            codec=codec,
            count=count,
            num_examples=0,
            loss=0.0,
            train_seconds=0.0,
            payload=payload,
        )
    )
