"""Replay a deployment's run in this process: the same nodes and rows in each round, no network.

In:  the run's books, which say by round which nodes were asked, which of them answered, and when a
     node registered; the nodes' files.
Out: the final values' hash, which must be that of the run (law 6).

A node that was asked and whose update was not used fails here too; one that was not asked is not
connected. A registration that took the real node some rounds is answered as late.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import Error, Message

from fedpet.client.node import Node
from fedpet.client.node_config import NodeConfig
from fedpet.config import Experiment
from fedpet.protocol.ledger import Ledger, RoundRecord
from fedpet.run.callbacks import Callback
from fedpet.run.federate import federate, prepare
from fedpet.run.local_grid import CLIENT_RAISED, LocalGrid
from fedpet.run.run_folder import new_run_folder

__all__ = ["replay", "take_part"]

Lines = Sequence[Mapping[str, Any]]


def take_part(line: Mapping[str, Any]) -> tuple[set[str], set[str]]:
    """Return the nodes that a round asked to train, and those of them whose updates it used."""
    asked = {name for name, sent in line["wire_by_node"].items() if "train down" in sent}
    return asked, asked - {refused.get("node") for refused in line["refused"]}


class ReplayGrid(LocalGrid, Callback):
    """Give each round the nodes that it had.

    Args:
        nodes: Name -> what answers a message's bytes.
        lines: Of `rounds.jsonl`.
        change_rows: Is called with a node whose rows changed in a round, before it trains.
    """

    def __init__(
        self,
        nodes: Mapping[str, Callable[[bytes], bytes]],
        lines: Lines,
        change_rows: Callable[[str], None],
    ) -> None:
        self._lines = {int(line["round"]): line for line in lines}
        handlers, self._names = {}, {}
        for index, (name, answer) in enumerate(nodes.items()):
            for failures in range(len(lines) + 1):
                node = 1 + index + failures * len(nodes)
                handlers[node], self._names[node] = answer, name
        super().__init__(handlers)
        self._change_rows = change_rows
        self._round = 1
        self._due: dict[str, int] = {}  # message -> round in which its answer comes
        self._there: set[int] = set()  # nodes that have been asked who they are

    def on_round_end(self, record: RoundRecord, ledger: Ledger) -> None:
        """Go on to the next round."""
        self._round = record.round + 1

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes that the round asked; after a failure a node is another one.

        A server waits before it asks a node again that has failed, by the clock.
        """
        asked, _ = take_part(self._lines[min(self._round, self._end() - 1)])
        ids: dict[str, list[int]] = {}
        for node, name in self._names.items():
            ids.setdefault(name, []).append(node)
        there = [ids[name][self._failures(name)] for name in asked]
        self._there.intersection_update(there)
        return there

    def _failures(self, name: str) -> int:
        before = (line for number, line in self._lines.items() if number < self._round)
        return sum(name in asked - used for asked, used in map(take_part, before))

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Answer at once; the answer to a question comes in the round in which it did."""
        numbers = []
        for message in messages:
            [number] = super().push_messages([message])
            if message.metadata.message_type == "query":
                node = message.metadata.dst_node_id
                if node in self._there:  # its rows have changed
                    self._due[number] = self._registered_again(self._names[node])
                self._there.add(node)
            numbers.append(number)
        return numbers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Hand out the replies that are due."""
        due = [number for number in message_ids if self._due.get(number, 0) <= self._round]
        return super().pull_messages(due)

    def _registered_again(self, name: str) -> int:
        """Return the round, from this one on, in which a node's new rows began to count."""
        end = self._end()
        for number in range(self._round, end):
            for event in self._lines[number].get("events", ()):
                if (event["node"], event["event"]) == (name, "registered again"):
                    return number
        return end

    def _end(self) -> int:
        return 1 + max(int(number) for number in self._lines)

    def _answer(self, message: Message) -> Message:
        name = self._names[message.metadata.dst_node_id]
        if message.metadata.message_type == "train":
            line = self._lines[self._round]
            changed = {"node": name, "event": "rows changed", "details": ""}
            if changed in line.get("events", ()):
                self._change_rows(name)
            if name not in take_part(line)[1]:
                return Message(Error(CLIENT_RAISED, "its update was not used"), reply_to=message)
        return super()._answer(message)


def replay(
    experiment: Experiment,
    nodes: Mapping[str, Path],
    lines: Lines,
    folder: Path,
    change_rows: Callable[[str], None],
) -> str:
    """Run the rounds again.

    Args:
        experiment: As the server ran it.
        nodes: Name -> the node's folder, with its `node.toml`.
        lines: Of the run's `rounds.jsonl`.
        folder: Where the replay may write; in it, NAME.jsonl are the rows of each node.
        change_rows: Is called with a node's name before it trains on other rows.

    Returns:
        SHA-256 of the final values.
    """
    run = replace(experiment.run, out=str(folder / "run"), cache=str(folder / "cache"))
    clients = replace(experiment.clients, node_keys="")
    experiment = replace(experiment, run=run, clients=clients)
    handlers = {}
    for name, place in nodes.items():
        config = tomllib.loads((place / "node.toml").read_text(encoding="utf-8"))
        own = {"data": str(folder / f"{name}.jsonl"), "cache": str(folder / name)}
        handlers[name] = Node(NodeConfig.from_experiment(experiment, config | own)).answer
    grid = ReplayGrid(handlers, lines, change_rows)
    result = federate(grid, prepare(experiment, grid), new_run_folder(experiment), grid)
    return str(result["final_values_sha256"])
