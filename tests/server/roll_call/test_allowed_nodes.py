"""Names are bound to keys: a node brings its own clients, as many as it may, of rows in bounds."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.proto.node_pb2 import NodeInfo
from in_process_run import run
from roll_call_runs import lines_of, node_of, put_key

from fedpet.config import Experiment
from fedpet.errors import ConfigError
from fedpet.run.local_grid import LocalGrid
from fedpet.server.allowed_nodes import AllowedNodes


@pytest.mark.parametrize(
    ("bounds", "brought", "words"),
    [
        ("", {"a": 5}, ""),
        ("", {"b": 5}, "brings the name of 'b'"),
        ("", {"c": 5}, "may bring 'a'"),
        ("", {"a": 5, "c": 5}, "brings 2 clients and may bring 1"),
        ("clients = 2", {"c": 5, "d": 5}, ""),
        ("clients = 2", {"c": 5, "b": 5}, "brings the name of 'b'"),
        ('clients = 2\nnames = ["x", "y"]', {"x": 5}, ""),
        ('clients = 2\nnames = ["x", "y"]', {"z": 5}, "may bring 'x', 'y'"),
        ("rows = 5", {"a": 5}, ""),
        ("rows = 5", {"a": 6}, "holds 6 rows, and may hold 5"),
    ],
)
def test_a_node_brings_what_its_bounds_say(
    tmp_path: Path, bounds: str, brought: dict[str, int], words: str
) -> None:
    key = put_key(tmp_path, "a", bounds)
    put_key(tmp_path, "b")
    allowed = AllowedNodes(tmp_path)
    node = allowed.of_key(key)
    assert node is not None
    refused = allowed.refuse(node, brought)
    assert bool(refused) == bool(words)
    assert all(words in reason for reason in refused.values())


def test_the_folder_is_read_anew_when_it_changes(tmp_path: Path) -> None:
    first = put_key(tmp_path, "a")
    allowed = AllowedNodes(tmp_path)
    second = put_key(tmp_path, "b")
    assert allowed.of_key(second) is None
    allowed.refresh()
    assert allowed.of_key(second) is not None
    (tmp_path / "a.pub").unlink()
    allowed.refresh()
    assert allowed.of_key(first) is None


def test_a_bound_that_changes_counts_from_then_on(tmp_path: Path) -> None:
    key = put_key(tmp_path, "a", "rows = 5")
    allowed = AllowedNodes(tmp_path)
    (tmp_path / "a.toml").write_text("rows = 7")
    os.utime(tmp_path / "a.toml", (time.time() + 9, time.time() + 9))
    allowed.refresh()
    node = allowed.of_key(key)
    assert node is not None
    assert node.rows == 7


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a.toml": "rows = 0"}, "rows = 0"),
        ({"a.toml": "clients = true"}, "clients = True"),
        ({"a.toml": "more = 1"}, "more = 1"),
        ({"a.toml": "rows = "}, "does not read"),
        ({"a.pub": "no key"}, "no public key in OpenSSH's format"),
        ({"a.toml": 'names = ["b"]'}, "share 'b'"),
    ],
)
def test_files_that_cannot_be_are_refused_by_name(
    tmp_path: Path, files: dict[str, str], words: str
) -> None:
    put_key(tmp_path, "a")
    put_key(tmp_path, "b")
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=words):
        AllowedNodes(tmp_path)


def test_two_nodes_of_one_key_are_refused(tmp_path: Path) -> None:
    put_key(tmp_path, "a")
    (tmp_path / "b.pub").write_bytes((tmp_path / "a.pub").read_bytes())
    with pytest.raises(ConfigError, match="'a' and 'b' have one key"):
        AllowedNodes(tmp_path)


class KeyedGrid(LocalGrid):
    """Flower's books of the nodes: a key each."""

    keys: dict[int, bytes]

    def get_nodes(self) -> Any:
        return [NodeInfo(node_id=n, public_key=self.keys[n]) for n in self.get_node_ids()]


def test_who_says_another_s_name_is_refused_by_its_own_and_the_owner_trains(
    deployed: Callable[..., Experiment], files: tuple[Path, Path], tmp_path: Path
) -> None:
    keys = {1: put_key(tmp_path / "keys", "client 0"), 2: put_key(tmp_path / "keys", "client 1")}
    changes = {"clients_num_clients": 1, "strategy_node_wait_seconds": 0.5}
    settings = deployed(clients_node_keys=str(tmp_path / "keys"), **changes)
    settings_out = Path(settings.run.out)
    thief = node_of(settings, files[1], ["client 0"])  # comes first, and is node 1's key's no more
    owner = node_of(settings, files[1], ["client 0"])
    grid = KeyedGrid({1: owner, 2: thief, 3: thief})
    grid.keys = {**keys, 3: b"unknown"}
    result = run(settings, grid)
    refused = [one for line in lines_of(settings) for one in line["refused"]]
    assert [one["who"] for one in refused] == ["client 1"]
    assert "node 'client 1' brings the name of 'client 0'" in refused[0]["reason"]
    assert (result["data"]["clients"], settings_out.is_dir()) == (1, True)


def test_a_thousand_made_up_clients_are_none(
    deployed: Callable[..., Experiment], files: tuple[Path, Path], tmp_path: Path
) -> None:
    from fedpet.protocol.registration import encode_registration
    from fedpet.protocol.request import read_request

    keys = {1: put_key(tmp_path / "keys", "client 0"), 2: put_key(tmp_path / "keys", "client 1")}
    settings = deployed(
        clients_node_keys=str(tmp_path / "keys"), clients_num_clients=2,
        strategy_node_wait_seconds=1e9,  # nobody else can come: it is not waited for
    )  # fmt: skip

    def many(payload: bytes) -> bytes:
        assert not read_request(payload).clients, "none of its clients is drawn"
        return encode_registration({f"made up {n}": 2**32 - 1 for n in range(1000)})

    grid = KeyedGrid({1: node_of(settings, files[1], ["client 0"]), 2: many})
    grid.keys = keys
    result = run(settings, grid)
    assert result["data"]["clients"] == 1


def test_rows_that_a_node_claims_take_no_memory(
    deployed: Callable[..., Experiment], files: tuple[Path, Path]
) -> None:
    from fedpet.protocol.registration import decode_registration, encode_registration
    from fedpet.protocol.request import read_request

    settings = deployed(clients_num_clients=1)
    honest = node_of(settings, files[1], ["client 0"])

    def inflated(payload: bytes) -> bytes:
        answer = honest(payload)
        if read_request(payload).clients:
            return answer
        said = decode_registration(answer)
        return encode_registration(dict.fromkeys(said.num_rows, 2**32 - 1), said.versions)

    result = run(settings, LocalGrid({1: inflated}))
    assert result["data"]["train_rows"] == 2**32 - 1
