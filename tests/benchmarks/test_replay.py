"""A replay of a deployment's books ends with the deployment's values."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.proto.node_pb2 import NodeInfo
from in_process_run import run
from roll_call_runs import (
    lines_of,
    meanwhile,
    node_of,
    on_nodes,
    put_key,
    rows_of,
    write_lines,
)

from fedpet.config import Experiment
from fedpet.run.local_grid import LocalGrid

NAMES = {1: "attic", 2: "barn", 3: "cellar"}


class Nodes(LocalGrid):
    """Three nodes, of which some are there; a second question is answered a round late."""

    keys: dict[int, bytes]

    def __init__(self, handlers: dict[int, Any]) -> None:
        super().__init__(handlers)
        self._asked: set[int] = set()
        self._late: dict[str, int] = {}  # message -> looks at the nodes until it is answered

    def get_nodes(self) -> Any:
        self._late = {number: looks - 1 for number, looks in self._late.items()}
        return [NodeInfo(node_id=node, public_key=key) for node, key in self.keys.items()]

    def push_messages(self, messages: Any) -> Any:
        sent = list(messages)
        numbers = list(super().push_messages(sent))
        for message, number in zip(sent, numbers, strict=True):
            node = message.metadata.dst_node_id
            if message.metadata.message_type == "query":
                self._late[number] = 1 if node in self._asked else 0
                self._asked.add(node)
        return numbers

    def pull_messages(self, message_ids: Any) -> Any:
        return super().pull_messages([n for n in message_ids if self._late.get(n, 0) <= 0])


def test_a_replay_of_an_eventful_run_has_its_values(
    experiment: Callable[..., Experiment], files: tuple[Path, Path], tmp_path: Path
) -> None:
    from benchmarks.replay import replay

    keys = {
        n: put_key(tmp_path / "keys", name, f'names = ["client {n}"]') for n, name in NAMES.items()
    }
    settings = on_nodes(
        experiment, clients_num_clients=3, strategy_num_rounds=8, strategy_quorum=0.1,
        codec_downlink="dither-5", codec_uplink="dither-3", codec_downlink_mode="delta",
    )  # fmt: skip
    settings = replace(
        settings, clients=replace(settings.clients, node_keys=str(tmp_path / "keys"))
    )
    handlers = {n: node_of(settings, files[1], [f"client {n}"]) for n in NAMES}
    again = tmp_path / "again"
    again.mkdir()
    for n, name in NAMES.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "node.toml").write_text("")
        shutil.copy(rows_of(settings, f"client {n}"), again / f"{name}.jsonl")
    rows = rows_of(settings, "client 2")
    lines = rows.read_text(encoding="utf-8").splitlines()
    grid = Nodes(handlers)
    grid.keys = dict(keys)

    def fail() -> None:
        raise OSError(28, "No space left on device")

    happens: dict[int, Callable[[], object]] = {
        2: lambda: write_lines(rows, lines * 2),
        4: lambda: grid.keys.pop(3),
        6: lambda: grid.keys.update(keys),
    }
    grid._handlers[2] = meanwhile(handlers[2], happens)
    grid._handlers[1] = meanwhile(handlers[1], {3: fail})
    result = run(settings, grid)
    told = {(e["node"], e["event"]) for e in result["events"]}
    assert told == {
        ("attic", "suspended"), ("attic", "registered"),
        ("barn", "rows changed"), ("barn", "registered again"),
        ("cellar", "disconnected"), ("cellar", "registered"),
    }  # fmt: skip
    assert {refused["node"] for refused in result["refused"]} == {"attic"}
    places = {name: tmp_path / name for name in NAMES.values()}

    def change(name: str) -> None:
        write_lines(again / f"{name}.jsonl", lines * 2)

    found = lines_of(settings)
    assert replay(settings, places, found, again, change) == result["final_values_sha256"]
