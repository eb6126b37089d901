"""Law 6 of a search: on any nodes, by any command, the same structure; without one, no trace."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from in_process_run import run
from search_runs import lines_of, structure_of
from tiny import Silent

from fedpet.cli import main
from fedpet.client.node import Node
from fedpet.client.node_config import NodeConfig
from fedpet.config import Experiment
from fedpet.protocol.plan import Plan
from fedpet.run.central_search import state_file
from fedpet.run.local_grid import LocalGrid
from fedpet.run.ray_engine import simulate


def test_the_order_of_replies_and_the_spread_over_nodes_change_no_bit(experiment: Any) -> None:
    class Reversed(LocalGrid):
        def pull_messages(self, message_ids: Any) -> Any:
            return list(super().pull_messages(message_ids))[::-1]

    found = set()
    for nodes, kind in ((1, LocalGrid), (3, LocalGrid), (3, Reversed)):
        settings = experiment(search_local_steps=2)
        node = NodeConfig.from_experiment(settings)
        grid = kind({n: Node(node).answer for n in range(1, nodes + 1)})
        result = run(settings, grid)
        text = (Path(settings.run.out) / "structure.json").read_bytes()
        found.add((hashlib.sha256(text).hexdigest(), result["final_values_sha256"]))
    assert len(found) == 1


def test_nodes_that_bring_their_own_files_search_what_the_simulation_does(
    experiment: Any, files: tuple[Path, Path], tmp_path: Path
) -> None:
    (server := tmp_path / "server").mkdir()
    shutil.copy(files[1] / "test.jsonl", server)
    settings = experiment(
        clients_partition="nodes", clients_num_clients=6, strategy_node_wait_seconds=5.0
    )
    settings = replace(settings, data=replace(settings.data, source=str(server)))
    lines = (files[1] / "train.jsonl").read_text(encoding="utf-8").splitlines()
    nodes: dict[int, Callable[[bytes], bytes]] = {}
    for node, clients in {7: ("client 0", "client 4", "client 2"), 5: ("client 1",)}.items():
        nodes[node] = node_with(tmp_path / f"node{node}", settings, lines, clients)
    nodes[9] = node_with(tmp_path / "node9", settings, lines, ("client 3", "client 5"))
    deployed = run(settings, LocalGrid(nodes))
    simulated = experiment()
    expected = run(simulated)
    assert deployed["refused"] == []
    assert deployed["final_values_sha256"] == expected["final_values_sha256"]
    found = [structure_of(Path(s.run.out)) for s in (settings, simulated)]
    assert found[0].modules == found[1].modules
    assert found[0].gates == found[1].gates
    assert found[0].provenance["search"]["clients"] == 6
    on_nodes = ("classes", "rows")  # of the training rows the server knows their number alone
    for key in deployed["data"].keys() - on_nodes:
        assert deployed["data"][key] == expected["data"][key]


def node_with(
    folder: Path, settings: Experiment, lines: list[str], clients: tuple[str, ...]
) -> Callable[[bytes], bytes]:
    """A node whose own file holds the rows of some clients."""
    folder.mkdir()
    own = [line for line in lines if json.loads(line)["client"] in clients]
    (folder / "rows.jsonl").write_text("\n".join(own) + "\n", encoding="utf-8")
    config = {"data": str(folder / "rows.jsonl"), "cache": str(folder / "cache")}
    return Node(NodeConfig.from_experiment(settings, config)).answer


def test_training_after_a_search_is_training_with_the_structure_s_file(experiment: Any) -> None:
    together = experiment()
    found = run(together)
    file = Path(together.run.out) / "structure.json"
    apart = run(experiment(search_federated=False, structure_file=str(file)))
    assert found["final_values_sha256"] == apart["final_values_sha256"]
    assert found["run"]["plan_digest"] == apart["run"]["plan_digest"]
    assert found["quality"] == apart["quality"]
    assert found["model"] == apart["model"]


def test_a_search_that_is_not_switched_on_leaves_no_trace_in_plan_lines_or_result(
    experiment: Any,
) -> None:
    settings = experiment(search_federated=False)
    result = run(settings)
    out = Path(settings.run.out)
    plan = (out / "plan.bin").read_bytes()
    assert Plan.from_bytes(plan).search is None
    assert Plan.from_bytes(plan).to_bytes() == plan
    assert "by_kind" not in result["communication"]
    assert "search_rounds_seconds" not in result["time"]
    assert all("kind" not in line for line in lines_of(out, "training"))


@pytest.mark.simulation
@pytest.mark.timeout(300)
def test_a_search_alone_leaves_the_structure_that_a_run_trains_on_any_number_of_ray_workers(
    experiment: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import tomli_w

    settings, one_worker = experiment(), experiment(run_workers=1)
    expected = run(settings)
    structure = (Path(settings.run.out) / "structure.json").read_bytes()
    result, folder = simulate(one_worker, Silent())
    assert result["final_values_sha256"] == expected["final_values_sha256"]
    assert (folder.path / "structure.json").read_bytes() == structure
    file, out = tmp_path / "alone.toml", tmp_path / "alone.json"
    tables = replace(settings, search=replace(settings.search, federated=False)).to_tables()
    file.write_text(tomli_w.dumps(tables), encoding="utf-8")
    arguments = ["fedpet", "search", str(file), "--federated", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    main.main()
    printed = capsys.readouterr()
    assert "search round 3 of 3: " in printed.err
    assert "of the choice as before" in printed.err
    assert "ended: all rounds" in " ".join(printed.out.split())
    assert out.read_bytes() == structure
    assert not state_file(out).exists()
    lines = out.with_name("alone.json.rounds.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["search"] * 3
