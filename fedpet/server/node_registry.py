"""Register the nodes of a deployment: query each once for its clients and their rows.

In:  Flower's Grid, whose nodes are random numbers that come and go.
Out: the same Grid, in which a node counts once it has answered.

The query carries the plan, so that a node reads and tokenises its rows as the plan says, and finds
out then whether it can; it answers with names and numbers of rows
(fedpet/protocol/registration.py). Before the first round the registry waits for the expected
clients, while somebody who has not answered may come. Later it does not wait: a new node is queried
when it is seen, and its clients are drawn from the round after its answer. A node that reconnects
is queried again: its clients may have changed. When a node disconnects, nodes that had registered
one of its clients are queried too, because Flower gives a restarted device a new node id.

A node whose rows have changed says so in the answer to a train message, and is queried again before
the next round; so is one whose process was started again between two looks. One that cannot take
part is not drawn from until it has registered anew: it is queried again at once where it took part
before, then after `FIRST_PAUSE` seconds, and after twice as long each time, so that a mended node
is back within the run.

Where a folder says who may take part, a node is known by the name of its key, and brings no other
clients than its key may (fedpet/server/allowed_nodes.py).

The bytes of a registration count as the plan's.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Mapping

from flwr.app import Message
from flwr.serverapp import Grid

from fedpet.errors import FedpetError, PlanError, RunError
from fedpet.protocol.ledger import Ledger, one_line
from fedpet.protocol.registration import decode_registration, encode_registration
from fedpet.protocol.request import (
    Request,
    from_record,
    single_client_bytes,
    to_record,
    write_request,
)
from fedpet.server.allowed_nodes import AllowedNode, AllowedNodes
from fedpet.server.client_pool import ConnectedClientPool
from fedpet.server.client_records import ClientRecords
from fedpet.server.pending_messages import PendingMessages
from fedpet.server.reply_stream import GridWrapper
from fedpet.utils.source_digest import package_versions

MAX_QUERIES = 3  # of a node that answers with errors, before there is a pause
FIRST_PAUSE, LONGEST_PAUSE = 30.0, 1800.0  # seconds until a node that refuses is queried again
POLL_SECONDS = 0.5
MAX_TOLD = 8  # clients of a node that are refused by name, where it brings more than it may

LOG = logging.getLogger("fedpet")


class NodeRegistry(GridWrapper):
    """Wrap a Grid so that its nodes are those that have registered.

    Args:
        grid: Reaches the nodes.
        plan: The plan's bytes.
        residents: Clients and their homes; grows as nodes register.
        holders: Records of who has the plan: nodes that answered, and their clients.
        expected: Clients to wait for before the first round.
        wait_seconds: Longest time to wait for them.
        ledger: Counts bytes and refusals, in the open round.
        allowed: Nodes that may take part; None lets any node that Flower lets in.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        plan: bytes,
        residents: ConnectedClientPool,
        holders: ClientRecords,
        expected: int,
        wait_seconds: float,
        ledger: Ledger,
        allowed: AllowedNodes | None = None,
    ) -> None:
        super().__init__(grid)
        self._allowed = allowed
        self._known: dict[int, AllowedNode] = {}  # online node -> of its key
        self._answered: set[str] = set()  # allowed nodes, by name, that have answered
        self._question = write_request(Request((), b"", plan))
        self._residents = residents
        self._holders = holders
        self._expected = expected
        self._wait_seconds = wait_seconds
        self._ledger = ledger
        self._begun = False
        self._mailbox = PendingMessages(grid)
        # node -> queries since it connected; 1 where a registry before this one had its answer
        self._queries: dict[int, int] = dict.fromkeys(residents.online_nodes, 1)
        self._failures: dict[int, str] = {}  # node -> reason it takes no part
        self._told: dict[int, str] = {}  # node -> versions that were named
        self._starts: dict[int, str] = {}  # node -> when its process was last activated
        self._due: dict[int, float] = {}  # node that takes no part -> when it is queried again
        self._keys = {} if allowed is None else _keys(allowed)

    def get_node_ids(self) -> Iterable[int]:
        """Return the online nodes that have registered.

        Raises:
            RunError: All nodes that connected before the first round refused.
        """
        self._update()
        if not self._begun:
            self._wait()
            self._begun = True
        return sorted(self._residents.inhabited)

    def _wait(self) -> None:
        limit = time.monotonic() + self._wait_seconds
        while (count := len(self._residents.present)) < self._expected:
            if time.monotonic() > limit:
                LOG.warning(
                    "%s of %s clients came within %g seconds: going on with them.",
                    count,
                    self._expected,
                    self._wait_seconds,
                )
                break
            if self._allowed is not None and len(self._answered) == len(self._allowed.items()):
                LOG.warning("%s of %s clients came: going on with them.", count, self._expected)
                break
            time.sleep(POLL_SECONDS)
            self._update()
        if not self._residents.online_nodes and self._failures:
            node, reason = next(iter(self._failures.items()))
            raise RunError(
                f"none of {len(self._failures)} nodes that came can take part. Node "
                f"{self._residents.node_name(node)} says: "
                f"{reason}"
            )

    def _update(self) -> None:
        """Query new nodes, and register those that have answered."""
        nodes = self._online()
        for node in sorted(self._queries.keys() - nodes):
            self._note(node, "disconnected")
            del self._queries[node]
            self._failures.pop(node, None)
            self._due.pop(node, None)
            self._residents.stale_nodes.update(self._residents.unregister(node))
            self._holders.plan_nodes.discard(node)
        self._mailbox.send([self._query(node) for node in sorted(nodes) if self._needs_query(node)])
        for answer in sorted(self._mailbox.collect(), key=lambda m: m.metadata.src_node_id):
            self._read_answer(answer.metadata.src_node_id, answer)

    def _online(self) -> set[int]:
        """Return the nodes that are connected, without those whose key is not in the folder."""
        if self._allowed is None:
            return set(self._grid.get_node_ids())
        self._allowed.refresh()
        self._tell_keys(self._allowed)
        nodes = list(self.get_nodes())
        self._tell_starts({info.node_id: info.last_activated_at for info in nodes})
        found = {info.node_id: self._allowed.of_key(info.public_key) for info in nodes}
        for node in found.keys() - self._known.keys():
            if found[node] is None:
                LOG.warning("registration: node %s: its key is not in the folder of keys.", node)
        self._known = {node: allowed for node, allowed in found.items() if allowed is not None}
        self._residents.node_names.update({n: known.name for n, known in self._known.items()})
        return set(self._known)

    def _tell_starts(self, starts: dict[int, str]) -> None:
        """Note which nodes were started again between two looks, and query them anew."""
        before, self._starts = self._starts, starts
        for node in sorted(self._known.keys() & starts.keys()):
            if before.get(node) != starts[node]:
                self._note(node, "started again")
                self._residents.register_again(node)

    def _tell_keys(self, allowed: AllowedNodes) -> None:
        """Note whose key was replaced or withdrawn since the last look."""
        before, self._keys = self._keys, _keys(allowed)
        for name, key in before.items():
            if name not in self._keys:
                self._ledger.note(name, "key withdrawn")
            elif self._keys[name] != key:
                self._ledger.note(
                    name, "key replaced", "it takes part again once it has the new one."
                )

    def _may_bring(self, node: int, num_rows: dict[str, int]) -> dict[str, str]:
        """Return the clients that a node may not bring, with the reason."""
        if self._allowed is None:
            return {}
        return self._allowed.refuse(self._known[node], num_rows)

    def _name(self, node: int) -> str:
        return self._residents.node_names.get(node, f"node {node}")

    def _needs_query(self, node: int) -> bool:
        if node in self._mailbox.nodes:
            return False
        if node in self._residents.stale_nodes:
            return True
        if node in self._residents.online_nodes:
            return False
        failures = self._residents.failures[node]  # 1 of a node that has just been suspended
        due = self._due.setdefault(node, time.monotonic() + _pause(failures - 1))
        return time.monotonic() >= due

    def _query(self, node: int) -> Message:
        self._residents.stale_nodes.discard(node)
        self._due[node] = math.inf  # until it has answered
        self._queries[node] = self._queries.get(node, 0) + 1
        message = Message(to_record(self._question), dst_node_id=node, message_type="query")
        self._ledger.add_message(message)
        return message

    def _read_answer(self, node: int, answer: Message) -> None:
        self._ledger.add_message(answer)
        if node not in self._queries:
            return  # it disconnected since, and is queried again when it is back
        if node in self._known and (answer.has_content() or self._queries[node] >= MAX_QUERIES):
            self._answered.add(self._known[node].name)
        if answer.has_error():
            at_once = self._queries[node] < MAX_QUERIES  # it may have had a bad moment
            self._fail(node, answer.error.reason or "an unnamed error.", at_once=at_once)
            return
        try:
            registration = decode_registration(from_record(answer.content))
            self._check_versions(node, registration.versions)
        except FedpetError as error:
            self._fail(node, str(error))
            return
        num_rows = registration.num_rows
        self._failures.pop(node, None)
        self._due.pop(node, None)
        self._queries[node] = 1
        before = self._residents.rows_of(node)
        refused = self._may_bring(node, num_rows)
        mine = {client: rows for client, rows in num_rows.items() if client not in refused}
        taken = self._residents.register(node, mine)
        for client, reason in [*list(refused.items())[:MAX_TOLD], *taken.items()]:
            self._refuse(self._name(node), f"client {client!r}: {reason}")
        for client in (*refused, *taken):
            del num_rows[client]
        self._holders.plan_nodes.add(node)
        self._count(num_rows)
        self._tell_registration(node, num_rows, before)

    def _count(self, num_rows: dict[str, int]) -> None:
        """Count the bytes that each client alone would have received and sent, once a client."""
        newcomers = num_rows.keys() - self._holders.clients_with_plan
        self._holders.clients_with_plan.update(newcomers)
        self._ledger.current.newcomers += len(newcomers)
        down = single_client_bytes(len(self._question), reply=False)
        up = sum(
            single_client_bytes(
                len(encode_registration({c: num_rows[c]}, package_versions())), reply=True
            )
            for c in newcomers
        )
        self._ledger.add_client_bytes(plan=down * len(newcomers) + up)

    def _check_versions(self, node: int, theirs: Mapping[str, str]) -> None:
        """Name what a node runs in another version; refuse another fedpet.

        Raises:
            PlanError: Its fedpet is another.
        """
        ours = package_versions()
        other = {name: theirs.get(name, "") for name in ours if theirs.get(name) != ours[name]}
        listed = ", ".join(
            f"{name} {version or 'unknown'} instead of {ours[name]}"
            for name, version in sorted(other.items())
        )
        if "fedpet" in other:
            raise PlanError(
                f"the node runs {listed}: install the deployment's server/app there, by its "
                "constraints.txt."
            )
        if other and self._told.get(node) != listed:
            self._told[node] = listed
            LOG.warning(
                "registration: %s runs %s: results may differ in bits. Install by the "
                "deployment's constraints.txt.", self._name(node), one_line(listed),
            )  # fmt: skip

    def _tell_registration(
        self, node: int, num_rows: Mapping[str, int], before: int | None
    ) -> None:
        """Note that a node has registered; `before` are the rows of one that had."""
        rows = sum(num_rows.values())
        details = f"{len(num_rows)} client{'s' * (len(num_rows) != 1)}, {rows} rows"
        if before is not None:
            self._note(node, "registered again", f"{details}, {before} before")
        elif self._begun:
            self._note(node, "registered", details)

    def _note(self, node: int, event: str, details: str = "") -> None:
        LOG.info("registration: %s: %s %s", self._name(node), event, one_line(details))
        self._ledger.note(self._name(node), event, details)

    def _fail(self, node: int, reason: str, *, at_once: bool = False) -> None:
        self._residents.suspend(node)
        failures = self._residents.failures[node]
        self._due[node] = time.monotonic() + (0 if at_once else _pause(failures))
        self._failures[node] = one_line(reason)
        self._note(node, "suspended", reason)
        self._refuse(self._name(node), reason)

    def _refuse(self, who: str, reason: str) -> None:
        LOG.warning("registration: %s: %s", who, one_line(reason))
        self._ledger.refuse(who, reason)


def _keys(allowed: AllowedNodes) -> dict[str, bytes]:
    return {node.name: key for key, node in allowed.items()}


def _pause(failures: int) -> float:
    """Return the seconds until a node is queried that could not take part so often in a row."""
    if failures < 1:
        return 0.0
    return min(FIRST_PAUSE * 2.0 ** min(failures - 1, 30), LONGEST_PAUSE)
