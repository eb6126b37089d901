"""Which clients there are, who takes part in a round, and on which node each one is trained.

Clients are data, nodes are processes. A client is known by a stable name; a node by Flower's
random id. Sampling is by client, so it does not depend on the nodes; the spread over nodes decides
only where a client's work is done, never what comes out (law 6).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from fedpet.errors import DataError
from fedpet.utils.seeds import client_id64, derive_seed


@dataclass(frozen=True)
class ClientPool:
    """The clients of a federation.

    Attributes:
        num_rows: Client -> rows it holds.
        homes: Client -> the node it lives on. Empty where every node holds every client's rows,
            as in a simulation.
    """

    num_rows: Mapping[str, int]
    homes: Mapping[str, int]

    def __post_init__(self) -> None:
        numbers = {client_id64(client): client for client in self.num_rows}
        if len(numbers) != len(self.num_rows):
            raise DataError("two client names have the same 64-bit hash: rename one of them.")

    def by_number(self) -> dict[int, str]:
        """Client names by the number that stands for them in messages."""
        return {client_id64(client): client for client in self.num_rows}

    def sample(self, server_round: int, num_clients: int, seed: int) -> list[str]:
        """Draw a round's clients without replacement, in alphabetical order."""
        clients = sorted(self.num_rows)
        generator = np.random.default_rng(derive_seed("sample", seed, server_round))
        drawn = generator.choice(len(clients), min(num_clients, len(clients)), replace=False)
        return [clients[index] for index in sorted(drawn)]

    def cohorts(self, clients: Iterable[str], nodes: Iterable[int]) -> dict[int, list[str]]:
        """Spread clients over nodes: home where they have one, else to the least loaded node.

        The largest clients are placed first. A client whose home is not among `nodes` is left
        out: it cannot be trained this round.

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
    """The clients of a deployment: each lives on the node that has its rows, and comes with it.

    Only clients whose node is there are drawn. With all of them there, those drawn are the ones
    that a simulation of the same clients draws: sampling knows names and the seed, no nodes.

    Attributes:
        num_rows: Client -> rows it holds; those whose node has left included.
        homes: Client -> its node.
        names: Number in messages -> client.
        there: Nodes that are there and have said who lives on them.
        rivals: Node -> nodes that brought a client of its while it was there.
    """

    num_rows: dict[str, int] = field(default_factory=dict)
    homes: dict[str, int] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    there: set[int] = field(default_factory=set)
    contested_nodes: dict[int, set[int]] = field(default_factory=dict)

    def by_number(self) -> dict[int, str]:
        """Client names by number: the one dictionary that grows as nodes come."""
        return self.names

    def arrive(self, node: int, num_rows: Mapping[str, int]) -> dict[str, str]:
        """Take a node's clients in: those that it says, and no others that it once had.

        Who lives on another node that is there stays there.

        Returns:
            Clients that were not taken in, and why.
        """
        self.there.add(node)
        for client in [c for c, home in self.homes.items() if home == node and c not in num_rows]:
            del self.homes[client]
        refused: dict[str, str] = {}
        for client, rows in sorted(num_rows.items()):
            home, number = self.homes.get(client, node), client_id64(client)
            if home != node and home in self.there:
                refused[client] = f"node {node} brings this client, which lives on node {home}."
                self.contested_nodes.setdefault(home, set()).add(node)
            elif self.names.setdefault(number, client) != client:
                refused[client] = f"its 64-bit hash is that of client {self.names[number]!r}."
            else:
                self.num_rows[client], self.homes[client] = rows, node
        return refused

    def leave(self, node: int) -> set[int]:
        """A node is not there any more; its clients are remembered.

        Returns:
            Nodes that are there and brought a client of its, which may be theirs now.
        """
        self.there.discard(node)
        return self.contested_nodes.pop(node, set()) & self.there

    @property
    def inhabited(self) -> set[int]:
        """Nodes that are there and have a client."""
        return self.there & set(self.homes.values())

    @property
    def present(self) -> dict[str, int]:
        """Client -> rows, of the clients whose node is there."""
        there = (name for name, node in self.homes.items() if node in self.there)
        return {name: self.num_rows[name] for name in there}

    def sample(self, server_round: int, num_clients: int, seed: int) -> list[str]:
        """Draw a round's clients among those whose node is there, in alphabetical order."""
        return ClientPool(self.present, {}).sample(server_round, num_clients, seed)
