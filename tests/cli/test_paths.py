"""Paths that a user names: they mean the same from any directory, or are refused."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import in_process_run
import pytest
from tiny import Silent

from fedpet.client.node_config import NodeConfig, cache_folder, make_cache
from fedpet.config import Experiment
from fedpet.deploy import Deployment, NodeSpec
from fedpet.errors import ConfigError, DataError
from fedpet.export.saved_run import merge_run
from fedpet.run import flower_server
from fedpet.run.federate import prepare
from fedpet.run.resume import JournalWriter, check_journal, cut_short
from fedpet.run.run_folder import new_run_folder
from fedpet.server.client_records import ClientRecords
from fedpet.utils.paths import absolute, check_output


@pytest.fixture
def relative(
    files: tuple[Path, Path], experiment: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Experiment:
    """An experiment whose paths are relative to the directory that this test is in."""
    here = tmp_path / "here"
    here.mkdir()
    for name, folder in zip(("bert", "rows"), files, strict=True):
        (here / name).symlink_to(folder)
    monkeypatch.chdir(here)
    made: Experiment = experiment(
        backbone_model="bert",
        data_source="rows",
        run_out="run",
        run_cache="cache",
        strategy_num_rounds=1,
    )
    return made


def test_the_config_of_a_run_holds_absolute_paths(relative: Experiment) -> None:
    in_process_run.run(relative)
    tables = tomllib.loads(Path("run/config.toml").read_text(encoding="utf-8"))
    assert tables["backbone"]["model"] == os.path.abspath("bert")
    assert tables["data"]["source"] == os.path.abspath("rows")
    assert tables["run"]["cache"] == os.path.abspath("cache")
    assert tables["run"]["out"] == os.path.abspath("run")


def test_a_run_with_relative_paths_is_merged_from_another_directory(
    relative: Experiment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    in_process_run.run(relative)
    there = tmp_path / "there"
    there.mkdir()
    monkeypatch.chdir(there)
    merge_run(Path("../here/run"), Path("model"))
    left = (tmp_path / "here/run/model/model.safetensors").read_bytes()
    assert Path("model/model.safetensors").read_bytes() == left


def test_a_run_with_relative_paths_is_resumed_from_another_directory(
    relative: Experiment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    leave_journal(relative)
    monkeypatch.chdir(tmp_path)
    with cut_short(Path("here/run")) as settings:
        assert check_journal(Path("here/run"), prepare(settings, Silent())) is not None


def test_a_run_of_a_version_that_kept_relative_paths_is_resumed_where_it_began(
    relative: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as before:
        before.setattr(Experiment, "located", lambda self: self)
        leave_journal(relative)
    assert 'source = "rows"' in Path("run/config.toml").read_text()
    with cut_short(Path("run")) as settings:
        assert check_journal(Path("run"), prepare(settings, Silent())) is not None


def leave_journal(settings: Experiment) -> None:
    """As a run leaves it that is stopped after its first evaluation."""
    prepared = prepare(settings, Silent())
    out = new_run_folder(prepared.experiment)
    out.write_inputs(prepared.experiment, prepared.plan)

    class Strategy:
        digest = type(prepared.plan).digest(prepared.plan.to_bytes())

        class requests:
            holders = ClientRecords({})

        class ledger:
            path = None

            kind = "training"

        @staticmethod
        def state() -> dict[str, Any]:
            return {}

    import numpy as np

    values = np.zeros(prepared.plan.num_values, dtype=np.float32)
    made: Any = Strategy
    writer = JournalWriter(out.path, prepared, made, resumed=0)
    writer.write(server_round=0, values=values, ledger_bytes=0)


def test_names_that_are_no_files_here_stay_names(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bundled").mkdir()
    for name in ("bundled", "package:some-weights", "owner/name", "owner/name:part@revision"):
        tables = {"backbone": {"model": name}, "data": {"source": name}}
        settings = Experiment.from_tables(tables)
        assert settings.located() == settings


def test_a_structure_s_file_is_found_from_another_directory(
    monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = Experiment.from_tables({"structure": {"file": "s.json"}}).located()
    assert settings.structure.file == str(tmp_path / "s.json")
    assert settings.located() == settings


def test_a_deployment_names_a_structure_s_file_in_full(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s.json").write_text("{}")
    settings = Experiment.from_tables({"structure": {"file": "s.json"}})
    deployment = Deployment(experiment=settings, host="a", nodes=(NodeSpec("b"),))
    assert deployment.server_experiment().structure.file == str(tmp_path / "s.json")


def test_an_absolute_path_names_the_same_file_through_links(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "far" / "inside").mkdir(parents=True)
    (tmp_path / "far" / "rows.jsonl").write_text("x")
    (tmp_path / "link").symlink_to("far/inside")
    monkeypatch.chdir(tmp_path)
    assert absolute("link/../rows.jsonl").read_text() == "x"
    (tmp_path / "named.jsonl").symlink_to("far/rows.jsonl")
    assert absolute("./named.jsonl") == tmp_path / "named.jsonl", "its suffix says what it is"


@pytest.mark.parametrize(
    "key", ["backbone_model", "data_source", "structure_file", "run_out", "run_cache"]
)
def test_flower_s_server_refuses_a_relative_path(
    relative: Experiment, experiment: Any, key: str, tmp_path: Path
) -> None:
    value = {"backbone_model": "bert", "data_source": "rows"}.get(key, "some/place")
    made = experiment(**{key: value})
    with pytest.raises(ConfigError, match=f"{key.replace('_', '-')} in the run config must be an"):
        flower_server.refuse_relative(made)
    flower_server.refuse_relative(made.located())


def test_a_run_of_flower_s_server_takes_nothing_from_the_directory_it_happens_to_be_in(
    relative: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flower_server, "prepare", lambda *_, **__: pytest.fail("rows were read"))
    context: Any = SimpleNamespace(run_config=relative.to_run_config())
    grid: Any = None
    with pytest.raises(ConfigError, match="must be an absolute path, got 'cache': Flower's"):
        flower_server.serve_run(grid, context)
    assert not Path("run").exists()


def test_a_deployment_s_paths_are_relative_to_its_own_folders(relative: Experiment) -> None:
    tables = relative.to_tables()
    tables["clients"]["partition"] = "nodes"
    flower_server.refuse_relative(Experiment.from_tables(tables))


def test_a_node_s_cache_is_absolute(
    experiment: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDPET_CACHE", "mine")
    assert cache_folder(Experiment()) == tmp_path / "mine"
    assert NodeConfig.from_experiment(experiment(), {"cache": "c"}).cache == tmp_path / "c"


def test_a_cache_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        settings = Experiment.from_tables({"run": {"cache": str(place)}})
        with pytest.raises(DataError, match=r"cannot be made: .* by run.cache or \$FEDPET_CACHE"):
            make_cache(settings)


def test_a_file_that_could_not_be_written_is_refused(tmp_path: Path) -> None:
    check_output(tmp_path / "new")
    check_output(Path("/dev/null"))
    with pytest.raises(ValueError, match="it is a folder: name a file"):
        check_output(tmp_path)
    with pytest.raises(ValueError, match=r"there is no folder .*: make it first"):
        check_output(tmp_path / "absent" / "x")
    with pytest.raises(ValueError, match="File name too long"):
        check_output(tmp_path / ("x" * 300))
