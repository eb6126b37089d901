"""Derive the seeds of a round's codecs, which both sides know from the plan and the request.

A round has one public rotation a direction, so that the server can add what its clients send before
it is rotated back; rounding and dither have a seed a client, so that their errors average out.
"""

from __future__ import annotations

from fedpet.codec import Seeds
from fedpet.utils.seeds import derive_seed

__all__ = ["downlink_seed", "uplink_rotation_seed", "uplink_seeds"]


def downlink_seed(run_seed: int, server_round: int) -> int:
    """Return the seed of one round's downlink, its rotation included."""
    return derive_seed("downlink", run_seed, server_round)


def uplink_rotation_seed(run_seed: int, server_round: int) -> int:
    """Return the seed of the rotation that all clients of a round share."""
    return derive_seed("rotation", run_seed, server_round)


def uplink_seeds(run_seed: int, server_round: int, client: int) -> Seeds:
    """Return the seeds of one client's update, as `VectorCodec.encode` takes them."""
    own = derive_seed("encode", derive_seed("client", run_seed, server_round, client))
    return {"seed": own, "rotation_seed": uplink_rotation_seed(run_seed, server_round)}
