"""Who holds what of earlier rounds, as far as their answers tell.

Kept twice: by node, which decides what goes along in a message, and by client, each as if it were
alone on its node, for the ledger. A reference counts as held by whoever sent a usable update from
it: an answer that never came leaves open whether the request did.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Mapping

import numpy as np

from fedpet.errors import RunError

__all__ = ["ClientRecords"]


class ClientRecords:
    """The books of who holds what.

    Args:
        names: All clients; in a deployment those that came so far, and the books follow it.

    Attributes:
        run: Names this run in messages, never 0. Not its seed: a second run of one plan must not
            find on the nodes what the first one left.
        plan_nodes: Nodes known to hold the plan.
        told: Clients that have been sent the plan.
        accepted: Client -> the last round in which its update was taken.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.run = secrets.randbits(64) or 1
        self.plan_nodes: set[int] = set()
        self.told: set[str] = set()
        self.accepted: dict[str, int] = {}
        self._names = names
        self._nodes: dict[tuple[int, int], int] = {}  # (node, tier) -> round of its reference
        self._clients: dict[str, tuple[int, int]] = {}  # client -> tier, round

    def of_node(self, node: int, tier: int) -> int:
        """The round whose reference a node holds; 0 is the checkpoint, which all hold."""
        return self._nodes.get((node, tier), 0)

    def of_client(self, name: str, tier: int) -> int:
        """The same of a client that is alone on its node."""
        held, server_round = self._clients.get(name, (tier, 0))
        return server_round if held == tier else 0

    def answered(self, node: int, name: str, tier: int, server_round: int) -> None:
        """A usable update came: its sender had the round's reference."""
        self._nodes[node, tier] = server_round
        self._clients[name] = tier, server_round

    def keep_tier(self, name: str, tier: int) -> None:
        """A client trains this tier: what was accepted of another one is nothing to it."""
        if self._clients.get(name, (tier, 0))[0] != tier:
            self.accepted.pop(name, None)

    def forget_reference(self, node: int) -> None:
        """A node says that it does not hold the reference that it was taken to hold."""
        for key in [key for key in self._nodes if key[0] == node]:
            del self._nodes[key]

    def forget_clients(self, names: Collection[str]) -> None:
        """The same of clients, each alone on its node."""
        for name in names:
            self._clients.pop(name, None)

    def forget_plan(self, node: int) -> None:
        """A node says that it does not hold the plan: it holds nothing else either."""
        self.plan_nodes.discard(node)
        self.forget_reference(node)

    def state(self) -> dict[str, np.ndarray]:
        """What a run that goes on later must have; who was told the plan, the journal knows."""
        # Of a deployment those too who were there before a crash, and have not come back yet.
        names = sorted({*self._names, *self.accepted, *self._clients})
        held = [self._clients.get(name, (0, 0)) for name in names]
        return {
            "names": np.frombuffer(json.dumps(names).encode(), dtype=np.uint8),
            "run": np.array([self.run], dtype=np.uint64),
            "accepted": np.array([self.accepted.get(n, 0) for n in names], dtype=np.int64),
            "held": np.array(held, dtype=np.int64).reshape(-1, 2),
        }

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take what `state` gave.

        Raises:
            RunError: It is of other clients than those that are known from the start.
        """
        accepted, held = state["accepted"].tolist(), state["held"].tolist()
        names = json.loads(state["names"].tobytes())
        known = sorted(self._names)
        if not len(accepted) == len(held) == len(names) or (known and known != names):
            raise RunError(
                f"the journal is of {len(accepted)} clients, and those here are {len(known)}, or "
                "others: start the run anew."
            )
        self.run = int(state["run"][0])
        self.accepted = {n: last for n, last in zip(names, accepted, strict=True) if last}
        self._clients = {
            name: (tier, server_round)
            for name, (tier, server_round) in zip(names, held, strict=True)
            if server_round
        }
