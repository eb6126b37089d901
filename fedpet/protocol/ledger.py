"""Count every byte that is sent: by round, node, direction and kind.

In:  messages on their way, and the bytes that each device alone would have sent and received.
Out: `rounds.jsonl`, a line a round as it happens, and the sums for `result.json`.

Two counts, never mixed. `wire_bytes` is the size of this run's messages as Flower serialises them,
a message a node. All others are the bytes that the devices would have sent and received, each
client alone with its own message and framing; where every node is one client the two agree.

Rounds are of two kinds, "training" and "search", each counted from 1; lines of training do not name
theirs. A line of the kind "evaluation" has the messages by which clients measure the values after
the training round of its number, and train nothing.
"""

from __future__ import annotations

import json
import os
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import Message

from fedpet.errors import ConfigError, FrameError, RunError
from fedpet.protocol.request import Request, from_record, read_request, wire_bytes

TRAINING, SEARCH, EVALUATION = "training", "search", "evaluation"
PLAN = "plan down"  # in whichever message it travels
NO_REQUEST = Request((), b"")
MAX_REASON = 600  # characters of why a reply was refused


def one_line(words: str) -> str:
    """Make a stranger's words one printable line of bounded length, for logs and terminals."""
    line = "".join(c if c.isprintable() else " " for c in words[:MAX_REASON])
    return line if len(words) <= MAX_REASON else f"{line} ..."


@dataclass
class RoundRecord:
    """Costs and results of one round, in bytes and seconds; a line of `rounds.jsonl`.

    `newcomers` are the clients that are sent the plan. `train_seconds` is the longest node's local
    training: the length of the round if nothing but training took time. `wire_by_node` has
    `wire_bytes` by node, and for each by kind and direction: "train down", "search up", "query up",
    and "plan down", whichever message it is in.
    `metric` is the one that decides, `metrics` are all that were taken, by name; `by_client` is the
    spread of the first over clients, where held-out rows name theirs.
    `on_clients` has the metric on clients' own rows, by name: "before" and "after" the training of
    the round, or of a line of evaluation "seen" and "unseen"; see
    fedpet/server/client_spread.py. `client_evaluation_seconds` is the longest node's measuring.
    `overlap`, of a round of a search, compares its choice with that of the round before (Jaccard
    index). `events` tell what became of a deployment's nodes, in their order: see `Ledger.note`.
    """

    round: int
    clients: int = 0
    newcomers: int = 0
    replies: int = 0
    refused: list[dict[str, str]] = field(default_factory=list)
    aggregated: bool = False
    loss: float | None = None
    metric: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    uplink_bytes: int = 0
    downlink_bytes: int = 0
    plan_bytes: int = 0
    wire_bytes: int = 0
    wire_by_node: dict[str, dict[str, int]] = field(default_factory=dict)
    messages: int = 0
    train_seconds: float = 0.0
    round_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    kind: str = TRAINING
    overlap: float | None = None
    by_client: dict[str, float] = field(default_factory=dict)
    on_clients: dict[str, dict[str, Any]] = field(default_factory=dict)
    client_evaluation_seconds: float = 0.0
    events: list[dict[str, str]] = field(default_factory=list)

    def to_line(self) -> dict[str, Any]:
        """Return the line as a table."""
        line = asdict(self)
        if self.kind == TRAINING:
            del line["kind"]
        if self.kind != SEARCH:
            del line["overlap"]
        for name in ("by_client", "on_clients", "client_evaluation_seconds", "events"):
            if not line[name]:
                del line[name]
        return line


@dataclass
class Ledger:
    """Count and record the rounds of one run.

    Attributes:
        path: The file to append each round's line to, or None to keep them in memory only.
        rounds: The lines so far: those of a search first, then training's with round 0, the
            evaluation before it.
        kind: Of the rounds that begin from now on.
        node_name: Gives what lines call a node, by Flower's id.
        on_reply: Called with the open round's record, and how many of its clients have answered by
            now, when a reply is counted.

    Example:
        >>> ledger = Ledger()
        >>> record = ledger.begin(1)
        >>> for client in range(10):
        ...     ledger.add_client_bytes(down=400, up=120)
        >>> ledger.total("uplink_bytes"), ledger.total_bytes
        (1200.0, 5200)
    """

    path: Path | None = None
    rounds: list[RoundRecord] = field(default_factory=list)
    kind: str = TRAINING
    node_name: Callable[[int], str] = str
    on_reply: Callable[[RoundRecord, int], None] = lambda record, answered: None

    def __post_init__(self) -> None:
        self._expect_nobody()

    def begin(self, server_round: int, kind: str = "") -> RoundRecord:
        """Open a round's record, of the kind in force unless another is named."""
        self._expect_nobody()
        self.rounds.append(RoundRecord(round=server_round, kind=kind or self.kind))
        return self.current

    def _expect_nobody(self) -> None:
        self._answered = 0
        self._asked: set[int] = set()  # clients of the open round
        self._awaited: dict[str, deque[int]] = {}  # node -> clients of each of its messages

    @property
    def current(self) -> RoundRecord:
        """The record of the open round."""
        return self.rounds[-1]

    @classmethod
    def reopen(cls, path: Path, length: int) -> Ledger:
        """Open the ledger of an interrupted run, and cut off lines after its first `length` bytes.

        Args:
            path: The lines' file; it need not exist where `length` is 0.
            length: Bytes that the checkpoint knows of.

        Raises:
            ConfigError: The file is shorter, or its lines do not read.
        """
        whole = path.read_bytes() if path.exists() else b""
        try:
            if len(whole) < length:
                raise ValueError(f"it has {len(whole)} bytes instead of {length}")
            rounds = [RoundRecord(**json.loads(line)) for line in whole[:length].splitlines()]
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"{str(path)!r} is not what the run's journal was written beside: {error}."
            ) from None
        if len(whole) > length:
            os.truncate(path, length)
        return cls(path, rounds)

    def close(self) -> int:
        """Write the open round's line, flushed, so that a killed run leaves its lines.

        Returns:
            The length of the file afterwards, bytes.
        """
        if self.path is None:
            return 0
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.current.to_line()) + "\n")
                file.flush()
                return file.tell()
        except OSError as error:
            raise RunError(
                f"{str(self.path)!r} cannot be written: {error.strerror or error}. Make room; the "
                "run goes on from its last round with `fedpet simulate --resume`."
            ) from None

    def refuse(self, who: str, reason: str, node: int | None = None) -> None:
        """Record a client whose reply is not averaged, the reason, and the node where it is known.

        Nodes have names in a deployment. Elsewhere their ids are Flower's: long numbers, drawn anew
        for each run of a simulation.
        """
        known = {} if node is None else {"node": self.node_name(node)}
        self.current.refused.append({"who": who, **known, "reason": one_line(reason)})

    def note(self, node: str, event: str, details: str = "") -> None:
        """Record an event of a deployment's node.

        Args:
            node: Its name.
            event: "disconnected", "registered", "registered again", "rows changed", "suspended",
                "key replaced" or "key withdrawn"; docs/run-folder.md says what each means.
            details: Words on it.
        """
        self.current.events.append({"node": node, "event": event, "details": one_line(details)})

    def add_message(self, message: Message) -> None:
        """Count a message as it is sent or received, with the plan's bytes apart."""
        count, metadata = wire_bytes(message), message.metadata
        is_reply = bool(metadata.reply_to_message_id)
        node = self.node_name(metadata.src_node_id if is_reply else metadata.dst_node_id)
        request = NO_REQUEST if is_reply else _request_in(message)
        plan = len(request.plan)
        kind = metadata.message_type.partition(".")[0]
        if kind == "train" and self.current.kind == SEARCH:
            kind = SEARCH
        counts = self.current.wire_by_node.setdefault(node, {})
        for name, part in ((f"{kind} {'up' if is_reply else 'down'}", count - plan), (PLAN, plan)):
            if part:
                counts[name] = counts.get(name, 0) + part
        self.current.wire_bytes += count
        self.current.messages += 1
        awaited = self._awaited.setdefault(node, deque())
        if not is_reply:  # a client that is asked again has not answered yet
            self._answered -= len(self._asked.intersection(request.clients))
            self._asked.update(request.clients)
            awaited.append(len(request.clients))
        elif awaited and (answers := awaited.popleft()):
            self._answered += answers
            self.on_reply(self.current, self._answered)

    @property
    def wire_by_kind(self) -> dict[str, int]:
        """Sum of `wire_bytes` over all rounds, by kind of message and direction."""
        sums: Counter[str] = Counter()
        for record in self.rounds:
            for counts in record.wire_by_node.values():
                sums.update(counts)
        return dict(sorted(sums.items()))

    def add_client_bytes(self, *, down: int = 0, up: int = 0, plan: int = 0) -> None:
        """Count the bytes that one device alone receives and sends."""
        self.current.downlink_bytes += down
        self.current.uplink_bytes += up
        self.current.plan_bytes += plan

    def of_kind(self, kind: str) -> list[RoundRecord]:
        """Return the rounds of one kind, in their order."""
        return [record for record in self.rounds if record.kind == kind]

    @property
    def total_bytes(self) -> int:
        """Sum of the bytes of all devices, each alone: values both ways, and the plan."""
        return sum(r.uplink_bytes + r.downlink_bytes + r.plan_bytes for r in self.rounds)

    def total(self, name: str, kind: str = "") -> float:
        """Return the sum of a numeric field over all rounds, or those of one kind."""
        rounds = self.of_kind(kind) if kind else self.rounds
        return float(sum(getattr(record, name) for record in rounds))


def _request_in(message: Message) -> Request:
    """Read a message's request; one that asks nothing where it has none."""
    try:
        return read_request(from_record(message.content))
    except FrameError:
        return NO_REQUEST
