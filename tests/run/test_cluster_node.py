"""Complete a node's configuration on another machine, whose part this process plays."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import Silent

from fedpet.backbone.checkpoint import locate
from fedpet.client.model_cache import ModelCache
from fedpet.client.node_config import NodeConfig
from fedpet.client.plan_store import PlanStore
from fedpet.config import Experiment
from fedpet.data import load_data
from fedpet.errors import ConfigError, RunError
from fedpet.run import cluster_node
from fedpet.run.cluster_node import ClusterNode, File, FileReader
from fedpet.run.prepare import prepare
from fedpet.utils.source_digest import code_digest

ray = pytest.importorskip("ray")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The other machine's; Ray's objects are themselves, and the files travel in small pieces."""
    monkeypatch.setattr(ray, "get", lambda value: value)
    monkeypatch.setattr(cluster_node, "PIECE_BYTES", 1000)
    monkeypatch.setenv("FEDPET_CACHE", str(tmp_path / "other"))
    cluster_node._complete.cache_clear()
    return tmp_path / "other"


@pytest.fixture
def node(experiment: Callable[..., Experiment], tmp_path: Path) -> Callable[..., ClusterNode]:
    def make(**changes: Any) -> ClusterNode:
        settled = experiment(**changes)
        folder = tmp_path / "checkpoint"
        shutil.copytree(locate(settled.backbone), folder)
        reader = FileReader(str(folder))
        settings = NodeConfig.from_experiment(settled)
        data = load_data(
            settled.data, settled.clients, folder, cache=settings.cache, evaluation=False
        )
        return ClusterNode(
            settings=settings,
            has_cache=False,
            files=tuple(File.of(path) for path in sorted(folder.iterdir())),
            reader=SimpleNamespace(read=SimpleNamespace(remote=reader.read)),
            rows=data,
            collator="",
            code=code_digest(),
            shared=None,
        )

    return make


def test_the_same_files_under_the_same_path_are_read_there(
    node: Callable[..., ClusterNode], cache: Path
) -> None:
    made = node()
    here = made.here()
    assert here.backbone.model == made.settings.backbone.model
    assert here.cache == cache
    assert not cache.exists()


@pytest.mark.parametrize("there", ["absent", "longer", "as long"])
def test_files_that_are_absent_or_others_under_the_path_are_fetched_once(
    there: str, node: Callable[..., ClusterNode], cache: Path, tmp_path: Path
) -> None:
    made = node()
    path = tmp_path / "path"
    if there != "absent":
        shutil.copytree(tmp_path / "checkpoint", path)
        weights = bytearray((path / "model.safetensors").read_bytes())
        weights[-1] ^= 1
        (path / "model.safetensors").write_bytes(weights + b"x" * (there == "longer"))
    made = replace(
        made,
        settings=replace(made.settings, backbone=replace(made.settings.backbone, model=str(path))),
    )
    folder = Path(made.here().backbone.model)
    assert folder.parent == cache / "checkpoints"
    for file in made.files:
        assert (folder / file.name).read_bytes() == (
            tmp_path / "checkpoint" / file.name
        ).read_bytes()
    cluster_node._complete.cache_clear()
    shutil.rmtree(tmp_path / "checkpoint")  # not read a second time
    assert Path(made.here().backbone.model) == folder


def test_a_checkpoint_that_changes_under_a_run_is_refused_and_leaves_nothing(
    node: Callable[..., ClusterNode], cache: Path, tmp_path: Path
) -> None:
    made = node()
    elsewhere = replace(made.settings.backbone, model="/nowhere")
    made = replace(made, settings=replace(made.settings, backbone=elsewhere))
    (tmp_path / "checkpoint" / "config.json").write_text("{}")
    with pytest.raises(RunError, match=r"'config\.json' is no longer the file"):
        made.here()
    assert not [path for path in (cache / "checkpoints").iterdir() if path.is_dir()]


def test_rows_come_tokenised_and_no_source_is_looked_for(
    node: Callable[..., ClusterNode], cache: Path, experiment: Callable[..., Experiment]
) -> None:
    made = node()
    gone = replace(made.settings.data, source="/nowhere/rows")
    made = replace(made, settings=replace(made.settings, data=gone))
    here = made.here()
    plan = prepare(experiment(), Silent()).plan
    data = ModelCache(here, PlanStore(here.cache)).load_rows(plan)
    assert len(data.train) == 72
    assert [client.id for client in data.clients] == [f"client {i}" for i in range(6)]


def test_a_machine_with_another_fedpet_is_refused(
    node: Callable[..., ClusterNode], cache: Path
) -> None:
    with pytest.raises(ConfigError, match="another fedpet than the run"):
        replace(node(), code="0" * 64).here()


def test_where_the_experiment_names_a_cache_it_is_that_on_every_machine(
    node: Callable[..., ClusterNode], cache: Path
) -> None:
    made = replace(node(), has_cache=True)
    assert made.here().cache == made.settings.cache != cache


def test_a_cache_of_its_own_is_refused_where_machines_must_share_one(
    node: Callable[..., ClusterNode], cache: Path, tmp_path: Path
) -> None:
    marker = cluster_node._marker(tmp_path / "shared")
    made = replace(node(), shared=marker)
    with pytest.raises(ConfigError, match=r"its cache .*other' is its own.*by run\.cache"):
        made.here()
    cache.symlink_to(tmp_path / "shared")
    assert made.here().cache == cache


def test_two_messages_of_one_run_find_the_node_that_is_loaded(
    node: Callable[..., ClusterNode], cache: Path
) -> None:
    made = node()
    again = replace(made, reader=object())  # unpickled with every message
    assert made.here() is again.here()
