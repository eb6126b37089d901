"""Sample the clients of a round and spread them over nodes.

Clients are data, nodes are processes. A client has a stable name, a node Flower's random id.
Sampling is by client, so it does not depend on the nodes; the spread decides only where a client is
trained, never the result (law 6).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from fedpet.config import ClientEvaluation
from fedpet.errors import DataError
from fedpet.utils.seeds import client_id64, derive_seed


@dataclass(frozen=True)
class ClientPool:
    """Hold the clients of a federation.

    Attributes:
        num_rows: Client -> its number of rows.
        homes: Client -> id of its node. Empty where every node holds every client's rows, as in a
            simulation.
        rule: Says which clients never train; None: all do.

    Raises:
        DataError: Two names have the same 64-bit hash, which stands for them in messages.
    """

    num_rows: Mapping[str, int]
    homes: Mapping[str, int]
    rule: ClientEvaluation | None = None

    def __post_init__(self) -> None:
        if len(self.by_number()) != len(self.num_rows):
            raise DataError("two client names have the same 64-bit hash: rename one of them.")

    @cached_property
    def _numbers(self) -> dict[int, str]:
        return {client_id64(client): client for client in self.num_rows}

    @cached_property
    def _sorted(self) -> list[str]:
        return sorted(name for name in self.num_rows if not self._is_unseen(name))

    def _is_unseen(self, name: str) -> bool:
        return self.rule is not None and self.rule.is_unseen(name)

    def unseen(self) -> list[str]:
        """Return the clients that never train, in alphabetical order."""
        return sorted(filter(self._is_unseen, self.num_rows))

    def suspend(self, node: int) -> None:
        """Note that a node could not take part; a simulation's worker goes on all the same."""

    def took_part(self, node: int) -> None:
        """Note that a node's update is used."""

    def set_busy(self, nodes: set[int]) -> None:
        """Note the nodes that still train for a round before; any worker trains any client."""

    def register_again(self, node: int) -> None:
        """Note that a node's rows have changed; those of a simulation do not."""

    def node_name(self, node: int) -> str:
        """Return what logs and tables call a node: Flower's id."""
        return str(node)

    def by_number(self) -> dict[int, str]:
        """Return client names by the number that stands for them in messages."""
        return self._numbers

    def sample(self, server_round: int, num_clients: int, seed: int) -> list[str]:
        """Draw a round's clients without replacement.

        Returns:
            Names in alphabetical order: `num_clients`, or all where there are fewer.
        """
        return _draw(self._sorted, server_round, num_clients, seed)

    def cohorts(self, clients: Iterable[str], nodes: Iterable[int]) -> dict[int, list[str]]:
        """Spread clients over nodes: to their home, or else to the least loaded node.

        The largest clients are placed first. A client whose home is not among `nodes` is left
        out of the round.

        Returns:
            Node -> its clients in alphabetical order; no node without clients.
        """
        load = dict.fromkeys(sorted(nodes), 0)
        cohorts: dict[int, list[str]] = {}
        for client in sorted(clients, key=lambda name: (-self.num_rows[name], name)):
            node = self.homes.get(client) if self.homes else min(load, key=lambda n: (load[n], n))
            if node not in load:
                continue
            load[node] += self.num_rows[client]
            cohorts.setdefault(node, []).append(client)
        return {node: sorted(cohort) for node, cohort in sorted(cohorts.items())}


@dataclass(frozen=True)
class ConnectedClientPool(ClientPool):
    """Hold the clients of a deployment: each lives on the node that has its rows.

    Only clients whose node is online are drawn. With all nodes online, the draw is that of a
    simulation of the same clients: sampling knows names and the seed, no nodes.

    Attributes:
        num_rows: Client -> its number of rows, whether its node is online or not.
        homes: Client -> id of its node.
        names: Number in messages -> client.
        online_nodes: Nodes that are connected and have registered their clients.
        contested_nodes: Node -> nodes that registered a client of its while it was online.
        stale_nodes: Online nodes whose rows are others than they registered: to be queried again.
        failures: Node -> times in a row that it could not take part; none of a node that could.
        busy_nodes: Nodes that still train for a round before.
        node_names: Node -> its name, where the deployment tells one.
    """

    num_rows: dict[str, int] = field(default_factory=dict)
    homes: dict[str, int] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    online_nodes: set[int] = field(default_factory=set)
    contested_nodes: dict[int, set[int]] = field(default_factory=dict)
    stale_nodes: set[int] = field(default_factory=set)
    failures: Counter[int] = field(default_factory=Counter)
    busy_nodes: set[int] = field(default_factory=set)
    node_names: dict[int, str] = field(default_factory=dict)

    def by_number(self) -> dict[int, str]:
        """Return client names by number: the one dictionary, which grows as nodes register."""
        return self.names

    def register(self, node: int, num_rows: Mapping[str, int]) -> dict[str, str]:
        """Register a node's clients, and forget others that it once had.

        A client that lives on another online node stays there.

        Returns:
            Client -> reason, of those that were refused.
        """
        self.online_nodes.add(node)
        for client in [c for c, home in self.homes.items() if home == node and c not in num_rows]:
            del self.homes[client]
        refused: dict[str, str] = {}
        for client, rows in sorted(num_rows.items()):
            home, number = self.homes.get(client, node), client_id64(client)
            if home != node and home in self.online_nodes:
                refused[client] = (
                    f"node {self.node_name(node)} brings this client, which lives on node "
                    f"{self.node_name(home)}."
                )
                self.contested_nodes.setdefault(home, set()).add(node)
            elif self.names.setdefault(number, client) != client:
                refused[client] = f"its 64-bit hash is that of client {self.names[number]!r}."
            else:
                self.num_rows[client], self.homes[client] = rows, node
        return refused

    def suspend(self, node: int) -> None:
        """Draw no client of a node that cannot take part, until it has registered anew."""
        self.online_nodes.discard(node)
        self.stale_nodes.discard(node)
        self.failures[node] += 1

    def took_part(self, node: int) -> None:
        """Forget the times that a node could not take part."""
        del self.failures[node]

    def set_busy(self, nodes: set[int]) -> None:
        """Draw no client of nodes that still train for a round before."""
        self.busy_nodes.clear()
        self.busy_nodes.update(nodes)

    def register_again(self, node: int) -> None:
        """Have a node queried again before the next round."""
        if node in self.online_nodes:
            self.stale_nodes.add(node)

    def rows_of(self, node: int) -> int | None:
        """Return how many rows an online node has registered; None of one that has not."""
        if node not in self.online_nodes:
            return None
        return sum(self.num_rows[client] for client, home in self.homes.items() if home == node)

    def node_name(self, node: int) -> str:
        """Return a node's name; its id where it has none."""
        return self.node_names.get(node, str(node))

    def unregister(self, node: int) -> set[int]:
        """Take a node offline and remember its clients.

        Returns:
            Online nodes that had registered a client of its, which may be theirs now.
        """
        self.online_nodes.discard(node)
        self.stale_nodes.discard(node)
        del self.failures[node]
        return self.contested_nodes.pop(node, set()) & self.online_nodes

    @property
    def inhabited(self) -> set[int]:
        """Online nodes that have a client."""
        return self.online_nodes & set(self.homes.values())

    @property
    def present(self) -> dict[str, int]:
        """Client -> number of rows, of the clients whose node is online."""
        homes = self.homes.items()
        return {name: self.num_rows[name] for name, node in homes if node in self.online_nodes}

    def sample(self, server_round: int, num_clients: int, seed: int) -> list[str]:
        """Draw a round's clients among those whose node is online, in alphabetical order."""
        there = [name for name in sorted(self.present) if not self._is_unseen(name)]
        free = [name for name in there if self.homes[name] not in self.busy_nodes]
        return _draw(free or there, server_round, num_clients, seed)

    def unseen(self) -> list[str]:
        """Return those that never train and whose node is online, in alphabetical order."""
        return sorted(filter(self._is_unseen, self.present))


def _draw(clients: Sequence[str], server_round: int, num_clients: int, seed: int) -> list[str]:
    """Draw from names in alphabetical order, and keep the order."""
    generator = np.random.default_rng(derive_seed("sample", seed, server_round))
    drawn = generator.choice(len(clients), min(num_clients, len(clients)), replace=False)
    return [clients[index] for index in sorted(drawn)]
