"""Cut a round's clients into chunks, and hand these to nodes in the order of the clients' names.

A chunk is what one message asks for and one reply brings, so it bounds the memory of node and
server, whatever a round's number of clients. A node has at most `IN_FLIGHT` of them: it trains one
while the other is on its way. Updates are summed in the order of names (law 6), so chunks go out in
that order, and few replies have to wait for earlier ones.

Where a round is no more than a chunk a node, each node gets one, the largest clients spread first
(`ClientPool.cohorts`). Where clients live on nodes, each node's own are cut. Else nodes take the
next chunk when they are free; chunks shrink towards the end, so that no node ends long after the
others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedpet.server.client_pool import ClientPool

__all__ = ["IN_FLIGHT", "Chunk", "Schedule", "chunk_size"]

IN_FLIGHT = 2
MOST, LEAST = 128, 8  # clients
REPLY_BYTES = 8 << 20  # of the longest replies that a chunk may have


@dataclass(frozen=True)
class Chunk:
    """Clients that one message asks a node to train.

    Attributes:
        node: Id of the node.
        names: The clients.
        brings_values: It carries the global values, and does not only name them.
        repeats: Messages that asked for the same before.
    """

    node: int
    names: Sequence[str]
    brings_values: bool = True
    repeats: int = 0


def chunk_size(longest: int) -> int:
    """Return how many clients a chunk may have whose payloads are at most `longest` bytes."""
    return min(max(REPLY_BYTES // longest, 1), MOST)


class Schedule:
    """Hand out the chunks of one round.

    Args:
        names: The round's clients, in alphabetical order.
        nodes: The online nodes.
        population: Rows and homes of the clients.
        most: Clients of a chunk.

    Attributes:
        nodes: Nodes that take part.
    """

    def __init__(
        self, names: Sequence[str], nodes: Sequence[int], population: ClientPool, most: int
    ) -> None:
        self._most = most
        self._rows: Mapping[str, int] = {}
        if population.homes or len(names) <= most * len(nodes):
            cohorts = population.cohorts(names, nodes)
            self._waiting = {node: deque(cohort) for node, cohort in cohorts.items()}
            self._unasked = {name for cohort in cohorts.values() for name in cohort}
        else:
            common = deque(names)
            self._waiting = {node: common for node in sorted(nodes)}
            self._unasked = {*names}
            self._rows = {name: population.num_rows[name] for name in names}
        self._rows_left = sum(self._rows.values())
        self.nodes = list(self._waiting)

    def clients_of(self, node: int) -> Sequence[str]:
        """Return the clients that a node may yet be asked to train."""
        return self._waiting[node]

    def next(self, node: int) -> list[str]:
        """Take a node's next chunk; [] where there is none."""
        waiting = self._waiting[node]
        share = self._rows_left / (2 * len(self.nodes))  # of a queue that several nodes take from
        chunk: list[str] = []
        rows = 0
        while waiting and len(chunk) < self._most:
            if self._rows and rows >= share and len(chunk) >= LEAST:
                break
            chunk.append(waiting.popleft())
            rows += self._rows.get(chunk[-1], 0)
        self._rows_left -= rows
        self._unasked.difference_update(chunk)
        return chunk

    def __contains__(self, name: str) -> bool:
        """Tell if a client's turn has not come."""
        return name in self._unasked
