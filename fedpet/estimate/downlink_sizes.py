"""What each client is sent: the values, or what leads to their reference from the one it holds.

    outline -> layout -> draws -> rules -> updates -> [downlink] -> messages -> cost

In:  the clients of each round, and the lengths of that round's change and whole reference.
Out: bytes of frames for each client of each round.

As fedpet/server/downlink.py does it: who holds the reference of an earlier round is sent the
changes
since then, where these are kept and shorter than the whole. Every client answers, so each holds
the reference of the round in which it last took part; all hold that of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedpet.estimate.participants import Participant
from fedpet.estimate.payload_simulation import Payloads
from fedpet.protocol.frame import HEADER_BYTES

__all__ = ["frames_down"]

MAX_CHANGES = 0xFFFF


def frames_down(
    lengths: Payloads, counts: Sequence[int], rounds: Sequence[Sequence[Participant]], changes: bool
) -> list[list[float]]:
    """Bytes of the frames that each client of each round is sent.

    Args:
        lengths: Of payloads.
        counts: Values of each tier.
        rounds: The clients of each.
        changes: Whether clients follow a reference.
    """
    frame, whole = lengths.down + HEADER_BYTES, lengths.whole + HEADER_BYTES  # (rounds, tiers)
    if not changes:
        return [[float(frame[r, t.tier]) for t in takers] for r, takers in enumerate(rounds)]
    first = [_first_kept(frame[:, tier], 4 * count + 1024) for tier, count in enumerate(counts)]
    until = np.vstack([np.zeros(len(counts)), np.cumsum(frame, axis=0)])  # sums before a round
    held: dict[int, int] = {}  # client -> the round whose reference it holds, from 1
    sent = []
    for r, takers in enumerate(rounds):
        each = []
        for taker in takers:
            since = min(held.get(taker.client, 0), r)  # changes from here on are missed
            chain = float(until[r + 1, taker.tier] - until[since, taker.tier])
            kept = since >= first[taker.tier][r]
            shorter = since == r or chain <= whole[r, taker.tier]
            each.append(chain if kept and shorter else float(whole[r, taker.tier]))
            held[taker.client] = r + 1
        sent.append(each)
    return sent


def _first_kept(frames: npt.NDArray[np.float64], most: int) -> list[int]:
    """For each round, from 0, the first one whose change is still kept."""
    first, kept, total = [], 0, 0.0
    for r, length in enumerate(frames):
        total += length
        while total > most or r - kept + 1 > MAX_CHANGES:
            total -= frames[kept]
            kept += 1
        first.append(kept)
    return first
