"""`flwr run` heeds a script in a simulation, and no real node runs one that a server names."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from runtime_api import bundle

from fedpet.client import flower_client, node
from fedpet.client.node_config import NodeConfig
from fedpet.client.worker import answer_task
from fedpet.config import Experiment
from fedpet.errors import ConfigError
from fedpet.run.flower_server import serve_run

REFUSAL = "real node, which runs no script that a server names: leave it out of the run config"
NODE_CONFIGS: list[dict[str, Any]] = [
    {},
    {"partition-id": 0, "num-partitions": 2},  # as a simulation's, which an owner may set too
    {"data": "rows.jsonl", "client": "ward-1"},
]


@pytest.fixture
def harmful(tmp_path: Path) -> Path:
    path = tmp_path / "theirs.py"
    path.write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n", encoding="utf-8")
    return path


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> list[NodeConfig]:
    """Return the configurations of the nodes that were to answer."""
    found: list[NodeConfig] = []
    for module in (flower_client, node):
        monkeypatch.setattr(module, "reply", lambda message, config: found.append(config))
    return found


def context_of(node_config: dict[str, Any], **changes: Any) -> Any:
    settings = Experiment.from_tables({"clients": changes}).to_run_config()
    return SimpleNamespace(run_config=settings, node_config=node_config)


def ask(context: Any, app: Path | None = None) -> None:
    """Pass a message to the functions of a ClientApp."""
    flower_client._answer(SimpleNamespace(), context, "", app)


def in_ray(monkeypatch: pytest.MonkeyPatch, actor: str | None) -> None:
    runtime = SimpleNamespace(get_actor_id=lambda: actor)
    ray = SimpleNamespace(is_initialized=lambda: True, get_runtime_context=lambda: runtime)
    monkeypatch.setitem(sys.modules, "ray", ray)


@pytest.mark.parametrize("node_config", NODE_CONFIGS, ids=["nothing", "partition", "rows"])
def test_a_script_in_the_run_config_is_refused_by_a_real_node_and_never_run(
    node_config: dict[str, Any],
    harmful: Path,
    answered: list[NodeConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context = context_of(node_config, script=str(harmful))
    with pytest.raises(ConfigError, match=REFUSAL):
        ask(context, harmful.parent)
    in_ray(monkeypatch, None)  # one who uses Ray beside, and is no worker of it
    with pytest.raises(ConfigError, match=REFUSAL):
        ask(context, harmful.parent)
    assert not answered
    assert not (harmful.parent / "executed").exists()


def test_a_real_node_with_rows_of_its_own_is_real_in_ray_s_workers_too(
    harmful: Path, answered: list[NodeConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_ray(monkeypatch, "an actor")
    with pytest.raises(ConfigError, match=REFUSAL):
        ask(context_of({"data": "rows.jsonl"}, script=str(harmful)))
    assert not answered


@pytest.mark.parametrize("own", [None, Path("/ward/own.py")])
def test_a_worker_that_stays_refuses_it_too_whatever_its_own_script_is(
    own: Path | None, harmful: Path, answered: list[NodeConfig]
) -> None:
    refused: list[str] = []
    task: Any = SimpleNamespace(
        message=SimpleNamespace(metadata=SimpleNamespace(message_type="train")),
        context=context_of({"data": "rows.jsonl", "client": "ward-1"}, script=str(harmful)),
        bundle=bundle({}).content,
        fail=refused.append,
        answer=answered.append,
    )
    answer_task(task, own)
    [reason] = refused
    assert REFUSAL in reason
    task.context = context_of({"data": "rows.jsonl", "client": "ward-1"})
    answer_task(task, own)
    assert [config.script for config in answered if config is not None] == [own]
    assert not (harmful.parent / "executed").exists()


def test_a_simulated_node_takes_the_script_of_its_app_s_folder_or_of_an_absolute_path(
    harmful: Path, answered: list[NodeConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_ray(monkeypatch, "an actor")
    app = tmp_path / "app"
    (app / "simulations").mkdir(parents=True)
    (app / "simulations" / "mine.py").write_text("", encoding="utf-8")
    simulated = {"partition-id": 1, "num-partitions": 2}
    for script in ("simulations/mine.py", str(harmful), ""):
        ask(context_of(simulated, script=script), app)
    scripts = [config.script for config in answered]
    assert scripts == [app / "simulations" / "mine.py", harmful, None]
    assert not (tmp_path / "executed").exists()  # it is run when a client trains


def test_a_server_refuses_a_script_for_nodes_that_bring_their_rows(harmful: Path) -> None:
    context = context_of({}, script=str(harmful), partition="nodes")
    with pytest.raises(ConfigError, match=r"nodes name their own \(`fedpet deploy \.\.\. --script"):
        serve_run(SimpleNamespace(), context, harmful.parent)  # type: ignore[arg-type]


def test_a_relative_script_that_is_not_in_the_app_is_refused_as_other_relative_paths_are(
    tmp_path: Path,
) -> None:
    context = context_of({}, script="simulations/absent.py")
    with pytest.raises(ConfigError, match="clients-script in the run config must be an absolute"):
        serve_run(SimpleNamespace(), context, tmp_path)  # type: ignore[arg-type]
