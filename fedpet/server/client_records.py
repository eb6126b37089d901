"""Record which nodes and clients have the plan and which reference, as far as replies tell.

References are recorded by node, which decides what a message must carry, and by client, each as if
it were alone on its node, for the ledger. A node has the reference of a round as soon as a usable
update of that round came from it; where no reply came, the request may not have come either.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Mapping

import numpy as np

from fedpet.errors import RunError

__all__ = ["ClientRecords"]


class ClientRecords:
    """Record what nodes and clients have.

    Args:
        names: All clients; in a deployment those registered so far, in a collection that grows.

    Attributes:
        run: Number of this run in messages, random and never 0, so that a second run of one plan
            does not use the values that the first one left on the nodes.
        plan_nodes: Nodes that have the plan.
        clients_with_plan: Clients that have been sent the plan.
        accepted: Client -> the last round that its update was part of.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.run = secrets.randbits(64) or 1
        self.plan_nodes: set[int] = set()
        self.clients_with_plan: set[str] = set()
        self.accepted: dict[str, int] = {}
        self._names = names
        self._nodes: dict[tuple[int, int], int] = {}  # (node, tier) -> round of its reference
        self._clients: dict[str, tuple[int, int]] = {}  # client -> tier, round

    def reference_of_node(self, node: int, tier: int) -> int:
        """Return the round of a node's reference; 0 is the checkpoint, which every node has."""
        return self._nodes.get((node, tier), 0)

    def reference_of_client(self, name: str, tier: int) -> int:
        """Return the same for a client that is alone on its node."""
        last_tier, server_round = self._clients.get(name, (tier, 0))
        return server_round if last_tier == tier else 0

    def answered(self, node: int, name: str, tier: int, server_round: int) -> None:
        """Record a usable update: its sender has the round's reference."""
        self._nodes[node, tier] = server_round
        self._clients[name] = tier, server_round

    def keep_tier(self, name: str, tier: int) -> None:
        """Forget the accepted update of a client that trained another tier than this one."""
        if self._clients.get(name, (tier, 0))[0] != tier:
            self.accepted.pop(name, None)

    def forget_reference(self, node: int) -> None:
        """Record that a node says it lacks its reference."""
        for key in [key for key in self._nodes if key[0] == node]:
            del self._nodes[key]

    def forget_clients(self, names: Collection[str]) -> None:
        """Record the same for clients, each alone on its node."""
        for name in names:
            self._clients.pop(name, None)

    def forget_plan(self, node: int) -> None:
        """Record that a node says it lacks the plan, and with it all references."""
        self.plan_nodes.discard(node)
        self.forget_reference(node)

    def state(self) -> dict[str, np.ndarray]:
        """Return what a resumed run needs; the journal lists who has the plan."""
        # In a deployment, with clients from before a crash whose nodes are not back yet.
        names = sorted({*self._names, *self.accepted, *self._clients})
        references = [self._clients.get(name, (0, 0)) for name in names]
        return {
            "names": np.frombuffer(json.dumps(names).encode(), dtype=np.uint8),
            "run": np.array([self.run], dtype=np.uint64),
            "accepted": np.array([self.accepted.get(n, 0) for n in names], dtype=np.int64),
            "held": np.array(references, dtype=np.int64).reshape(-1, 2),
        }

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Go back to a `state`.

        Raises:
            RunError: It is of other clients than those known from the start.
        """
        accepted, references = state["accepted"].tolist(), state["held"].tolist()
        names = json.loads(state["names"].tobytes())
        known = sorted(self._names)
        if not len(accepted) == len(references) == len(names) or (known and known != names):
            raise RunError(
                f"the journal is of {len(accepted)} clients, and those here are {len(known)}, or "
                "others: start the run anew."
            )
        self.run = int(state["run"][0])
        self.accepted = {n: last for n, last in zip(names, accepted, strict=True) if last}
        self._clients = {
            name: (tier, server_round)
            for name, (tier, server_round) in zip(names, references, strict=True)
            if server_round
        }
