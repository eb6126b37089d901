"""The roll call of a deployment: which clients live on which node, asked of each node once.

    ... -> plan -> client -> [strategy] -> ledger -> report

In:  Flower's Grid, whose nodes are random numbers that come and go.
Out: the same Grid, in which a node counts as soon as it has said who lives on it.

The question carries the plan, so that a node reads and tokenises its rows as the plan says, and
finds out then whether it can; names and counts of rows come back
(fedpet/protocol/registration.py). Before the
first round the call waits for the clients that are expected. Later on nobody is waited for: a
latecomer is asked when it is seen and drawn from the round after its answer. A node that left is
asked again when it comes back, since it may bring other clients; and when it leaves, so is every
node that brought a client of its: a device that was started anew is another node to Flower.

The bytes of the call count as the plan's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

from flwr.app import Message
from flwr.serverapp import Grid

from fedpet.errors import FedpetError, RunError
from fedpet.protocol.ledger import Ledger, one_line
from fedpet.protocol.registration import decode_registration, encode_registration
from fedpet.protocol.request import (
    Request,
    from_record,
    single_client_bytes,
    to_record,
    write_request,
)
from fedpet.server.client_pool import ConnectedClientPool
from fedpet.server.client_records import ClientRecords
from fedpet.server.pending_messages import PendingMessages
from fedpet.server.reply_stream import GridWrapper

MAX_ASKS = 3  # of a node whose answers are errors, before it is left alone
POLL_SECONDS = 0.5

LOG = logging.getLogger("fedpet")


class NodeRegistry(GridWrapper):
    """A Grid whose nodes are those that answered the roll call.

    Args:
        grid: Reaches the nodes.
        plan: The plan's bytes.
        residents: Where clients and homes are kept; grows as nodes come.
        holders: Who holds what: nodes that answered hold the plan, and their clients were told it.
        expected: Clients to wait for before the first round.
        wait_seconds: For how long at most.
        ledger: Where bytes and refusals are counted, in the round that is open.
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
    ) -> None:
        super().__init__(grid)
        self._question = write_request(Request((), b"", plan))
        self._residents = residents
        self._holders = holders
        self._expected = expected
        self._wait_seconds = wait_seconds
        self._ledger = ledger
        self._begun = False
        self._mailbox = PendingMessages(grid)
        # node -> how often it was asked since it came, or told the call before this one
        self._asks: dict[int, int] = dict.fromkeys(residents.there, 1)
        self._failures: dict[int, str] = {}  # node -> why it takes no part
        self._anew: set[int] = set()  # nodes that are there and are to be asked once more

    def get_node_ids(self) -> Iterable[int]:
        """Nodes that are there and have said who lives on them.

        Raises:
            RunError: Before the first round: all nodes that came refused.
        """
        self._call()
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
            time.sleep(POLL_SECONDS)
            self._call()
        if not self._residents.there and self._failures:
            node, reason = next(iter(self._failures.items()))
            raise RunError(
                f"none of {len(self._failures)} nodes that came can take part. Node {node} says: "
                f"{reason}"
            )

    def _call(self) -> None:
        """Ask the nodes that are new, and take in what has been answered."""
        nodes = set(self._grid.get_node_ids())
        for node in self._asks.keys() - nodes:
            del self._asks[node]
            self._failures.pop(node, None)
            self._anew |= self._residents.leave(node)
            self._holders.plan_nodes.discard(node)
        self._mailbox.send(
            [self._ask(node) for node in sorted(nodes) if self._is_to_be_asked(node)]
        )
        for answer in sorted(self._mailbox.collect(), key=lambda m: m.metadata.src_node_id):
            self._take_in(answer.metadata.src_node_id, answer)

    def _is_to_be_asked(self, node: int) -> bool:
        if node in self._mailbox.nodes:
            return False
        if node in self._anew:
            return True
        return node not in self._residents.there and self._asks.get(node, 0) < MAX_ASKS

    def _ask(self, node: int) -> Message:
        self._anew.discard(node)
        self._asks[node] = self._asks.get(node, 0) + 1
        message = Message(to_record(self._question), dst_node_id=node, message_type="query")
        self._ledger.add_message(message)
        return message

    def _take_in(self, node: int, answer: Message) -> None:
        self._ledger.add_message(answer)
        if node not in self._asks:
            return  # it left before its answer was read, and is asked again when it is back
        if answer.has_error():
            self._fail(node, answer.error.reason or "an unnamed error.")
            return
        try:
            num_rows = decode_registration(from_record(answer.content))
        except FedpetError as error:
            self._asks[node] = MAX_ASKS  # it would say the same again
            self._fail(node, str(error))
            return
        self._failures.pop(node, None)
        for client, reason in self._residents.arrive(node, num_rows).items():
            self._refuse(f"node {node}", f"client {client!r}: {reason}")
            del num_rows[client]
        self._holders.plan_nodes.add(node)
        self._count(num_rows)

    def _count(self, num_rows: dict[str, int]) -> None:
        """What each client alone would have received and sent; once a client."""
        newcomers = num_rows.keys() - self._holders.told
        self._holders.told.update(newcomers)
        self._ledger.current.newcomers += len(newcomers)
        down = single_client_bytes(self._question, reply=False)
        up = sum(
            single_client_bytes(encode_registration({c: num_rows[c]}), reply=True)
            for c in newcomers
        )
        self._ledger.add_client_bytes(plan=down * len(newcomers) + up)

    def _fail(self, node: int, reason: str) -> None:
        self._failures[node] = one_line(reason)
        self._refuse(f"node {node}", reason)

    def _refuse(self, who: str, reason: str) -> None:
        LOG.warning("roll call: %s: %s", who, one_line(reason))
        self._ledger.refuse(who, reason)
