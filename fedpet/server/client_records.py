"""Record which nodes and clients have the plan and which reference, as far as replies tell.

References are recorded by node, which decides what a message must carry, and by client, each as if
it were alone on its node, for the ledger. A node has the reference of a round as soon as a usable
update of that round came from it; where no reply came, the request may not have come either.
"""

from __future__ import annotations

import secrets
from collections import UserDict
from collections.abc import Collection, Iterable, Iterator, Mapping, MutableSet
from typing import NamedTuple, TypeVar

import numpy as np

from fedpet.errors import RunError

__all__ = ["ClientRecord", "ClientRecords"]


class ClientRecord(NamedTuple):
    """The record of one client, as a resumed run needs it."""

    has_plan: bool = False
    accepted: int = 0  # round
    tier: int = 0
    reference: int = 0  # round


Value = TypeVar("Value")


class _NotedDict(UserDict[str, Value]):
    """A dictionary by client that notes each client whose entry is set or deleted."""

    def __init__(self, changed: set[str]) -> None:
        self._changed = changed
        super().__init__()

    def __setitem__(self, name: str, value: Value) -> None:
        self._changed.add(name)
        self.data[name] = value

    def __delitem__(self, name: str) -> None:
        self._changed.add(name)
        del self.data[name]


class _NotedSet(MutableSet[str]):
    """A set of clients that notes each that is added or discarded."""

    def __init__(self, changed: set[str]) -> None:
        self._changed = changed
        self._names: set[str] = set()

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def add(self, name: str) -> None:
        self._changed.add(name)
        self._names.add(name)

    def discard(self, name: str) -> None:
        self._changed.add(name)
        self._names.discard(name)

    def update(self, names: Iterable[str]) -> None:
        self._changed.update(names := list(names))
        self._names.update(names)


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
        self._changed: set[str] = set()  # clients whose record was not yet given out
        self.clients_with_plan = _NotedSet(self._changed)
        self.accepted: _NotedDict[int] = _NotedDict(self._changed)
        self._names = names
        self._nodes: dict[tuple[int, int], int] = {}  # (node, tier) -> round of its reference
        self._clients: _NotedDict[tuple[int, int]] = _NotedDict(
            self._changed
        )  # client -> tier, round

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

    def record_of(self, name: str) -> ClientRecord:
        """Return the record of a client."""
        tier, reference = self._clients.get(name, (0, 0))
        has_plan = name in self.clients_with_plan
        return ClientRecord(has_plan, self.accepted.get(name, 0), tier, reference)

    def changed_records(self) -> dict[str, ClientRecord]:
        """Return the records that changed since this was called last, by name in their order."""
        records = {name: self.record_of(name) for name in sorted(self._changed)}
        self._changed.clear()
        return records

    def all_records(self) -> dict[str, ClientRecord]:
        """Return the records of all clients that have one."""
        names = {*self.clients_with_plan, *self.accepted, *self._clients}
        return {name: self.record_of(name) for name in sorted(names)}

    def load_records(self, records: Mapping[str, ClientRecord]) -> None:
        """Go back to these records, of all clients.

        Raises:
            RunError: They are of other clients than those known from the start.
        """
        strange = [name for name in records if self._names and name not in self._names]
        if strange:
            raise RunError(
                f"the journal is of {len(records)} clients, and {strange[0]!r} is none of the "
                f"{len(self._names)} here: start the run anew."
            )
        for name, record in records.items():
            if record.has_plan:
                self.clients_with_plan.add(name)
            if record.accepted:
                self.accepted[name] = record.accepted
            if record.reference:
                self._clients[name] = record.tier, record.reference

    def state(self) -> dict[str, np.ndarray]:
        """Return what else a resumed run needs; the journal lists who has the plan."""
        return {"run": np.array([self.run], dtype=np.uint64)}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Go back to a `state`."""
        self.run = int(state["run"][0])
