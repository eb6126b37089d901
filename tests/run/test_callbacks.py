"""Callbacks: what they are given, when, and in what order; trackers with the real packages."""

from __future__ import annotations

import importlib.util
import json
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

import fedpet
from fedpet.config import Experiment
from fedpet.config.schema import TRACKERS as KNOWN
from fedpet.errors import ConfigError
from fedpet.run import trackers

HERE: dict[str, Any] = {"backend": "in-process", "progress": False}
Make = Callable[..., Experiment]


class Recorder(fedpet.Callback):
    """Notes each event with what it was given."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []

    def on_run_start(self, run: Any) -> None:
        assert run.folder.is_dir()
        self.events.append(("start", run.num_clients))

    def on_evaluate(self, evaluation: Any) -> None:
        self.events.append(("evaluate", (evaluation.round, evaluation.metrics)))

    def on_round_end(self, record: Any, ledger: Any) -> None:
        self.events.append(("round", (record.round, ledger.total_bytes)))

    def on_run_end(self, result: Any, folder: Path) -> None:
        written = json.loads((folder / "result.json").read_text())
        assert written["final_values_sha256"] == result["final_values_sha256"]
        self.events.append(("end", result["quality"]["final"]))


def test_events_come_in_the_order_of_the_run_with_what_the_books_say(experiment: Make) -> None:
    recorder = Recorder()
    settings = experiment(strategy_num_rounds=2, strategy_evaluate_every=2)
    run = fedpet.simulate(settings, callbacks=recorder, **HERE)
    names = [name for name, _ in recorder.events]
    assert names == ["start", "evaluate", "round", "round", "evaluate", "round", "end"]
    assert recorder.events[0] == ("start", run.result["data"]["clients"])
    at, metrics = recorder.events[4][1]
    assert (at, next(iter(metrics))) == (2, "accuracy")
    assert metrics == {name: run.history[2][name] for name in metrics}
    assert metrics == {name: run.metrics[name] for name in metrics}
    assert [entry[1] for name, entry in recorder.events if name == "round"] == [
        row["total_bytes"] for row in run.history
    ]
    assert recorder.events[-1] == ("end", run.metrics["accuracy"])


def test_stages_are_called_too_and_several_callbacks_in_their_order(experiment: Make) -> None:
    heard: list[tuple[int, str]] = []

    class Stages(fedpet.Callback):
        def __init__(self, number: int) -> None:
            self.number = number

        def on_stage(self, text: str) -> None:
            heard.append((self.number, text))

    fedpet.simulate(experiment(strategy_num_rounds=1), callbacks=[Stages(1), Stages(2)], **HERE)
    assert [number for number, _ in heard] == [1, 2] * (len(heard) // 2)
    assert (1, "starting the rounds") in heard


def test_a_search_on_the_clients_ends_its_rounds_as_search(experiment: Make) -> None:
    kinds: list[str] = []

    class Kinds(fedpet.Callback):
        def on_round_end(self, record: Any, ledger: Any) -> None:
            kinds.append(record.kind)

    settings = experiment(
        search_federated=True, search_rounds=2, search_budget=600, strategy_num_rounds=1
    )
    fedpet.simulate(settings, callbacks=[Kinds()], **HERE)
    assert kinds == ["search", "search", "training", "training"]


def test_what_is_no_callback_is_refused_before_anything_is_read(experiment: Make) -> None:
    with pytest.raises(ConfigError, match="objects of a subclass of"):
        fedpet.simulate(experiment(), callbacks=[print], **HERE)


@pytest.mark.parametrize("name", trackers.TRACKERS)
def test_a_tracker_whose_package_is_absent_says_what_to_install(
    name: str, experiment: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, trackers.TRACKERS[name].package, None)  # type: ignore[attr-defined]
    for given in ({"callbacks": [name]}, {"run": {"callbacks": [name]}}):
        with pytest.raises(ConfigError, match=f"`pip install {name}`"):
            fedpet.simulate(experiment(), **given, **HERE)


def test_trackers_are_named_alike_in_the_experiment_and_in_the_api() -> None:
    assert tuple(trackers.TRACKERS) == KNOWN
    with pytest.raises(ConfigError, match="tensorboard, wandb, mlflow, trackio"):
        Experiment.from_tables({"run": {"callbacks": ["tensorbord"]}})
    assert get_args(get_type_hints(type(Experiment().run))["callbacks"])


def test_trackers_of_a_run_that_was_stopped_are_there_when_it_is_resumed(
    experiment: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Recorder] = []

    def make() -> Recorder:
        made.append(Recorder())
        return made[-1]

    class Stop(fedpet.Callback):
        def on_round_end(self, record: Any, ledger: Any) -> None:
            raise ZeroDivisionError

    monkeypatch.setattr(trackers, "TRACKERS", {"trackio": make})
    settings = experiment(strategy_num_rounds=1)
    with pytest.raises(ZeroDivisionError):
        fedpet.simulate(settings, callbacks=["trackio", Stop()], **HERE)
    fedpet.resume(settings.run.out, **HERE)
    assert [name for name, _ in made[1].events] == ["start", "evaluate", "round", "end"]


def with_tracker(name: str, experiment: Make) -> fedpet.Run:
    settings = experiment(strategy_num_rounds=2, run_callbacks=[name])
    return fedpet.simulate(settings, **HERE)


def test_tensorboard_shows_the_metric_and_the_bytes_of_each_round(experiment: Make) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = with_tracker("tensorboard", experiment)
    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    shown = [(e.step, pytest.approx(e.value)) for e in events.Scalars("evaluation/accuracy")]
    assert shown == [(row["round"], row["accuracy"]) for row in run.history]
    totals = [e.value for e in events.Scalars("bytes/total")]
    assert totals == [row["total_bytes"] for row in run.history[1:]]


def test_wandb_keeps_a_run_offline_in_the_run_folder(experiment: Make) -> None:
    pytest.importorskip("wandb")
    run = with_tracker("wandb", experiment)
    (log,) = (run.folder / "wandb").glob("offline-run-*/run-*.wandb")
    content = log.read_bytes()
    assert b"evaluation/accuracy" in content
    assert b"bytes/total" in content


@pytest.mark.filterwarnings("ignore:The ``noload`` loader")  # of mlflow's own queries
def test_mlflow_keeps_metrics_by_round_in_a_file_of_the_run_folder(experiment: Make) -> None:
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    run = with_tracker("mlflow", experiment)
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{run.folder / 'mlflow.db'}")
    number = client.get_experiment_by_name("fedpet").experiment_id
    (logged,) = client.search_runs([number])
    history = client.get_metric_history(logged.info.run_id, "evaluation/accuracy")
    assert [(m.step, m.value) for m in history] == [
        (row["round"], row["accuracy"]) for row in run.history
    ]
    assert logged.info.status == "FINISHED"
    assert logged.data.params["mask.density"] == "0.05"


def test_trackio_keeps_metrics_in_its_own_folder(
    experiment: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("trackio") is None:
        pytest.skip("trackio is not installed")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    run = with_tracker("trackio", experiment)
    found = []
    for file in (tmp_path / "trackio").rglob("*.db"):
        with sqlite3.connect(file) as database:
            found += [json.loads(row[0]) for row in database.execute("SELECT metrics FROM metrics")]
    accuracies = [row["evaluation/accuracy"] for row in found if "evaluation/accuracy" in row]
    assert accuracies == [row["accuracy"] for row in run.history]
