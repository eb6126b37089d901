"""Values of a saved small part are those of another run's round 0."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import in_process_run
import numpy as np
import pytest
import tiny

from fedpet.config import Experiment
from fedpet.errors import ConfigError
from fedpet.export.saved_run import SavedRun
from fedpet.run.prepare import prepare


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Experiment, dict[str, Any]]:
    """A run of two rounds, and its result."""
    folder = tmp_path_factory.mktemp("start")
    backbone, rows = tiny.make_backbone(folder / "bert"), tiny.make_rows(folder / "rows")
    experiment = tiny.make_experiment(backbone, rows, folder / "first", strategy_num_rounds=2)
    return experiment, in_process_run.run(experiment)


def following(experiment: Experiment, out: Path, start: Path, **changes: str) -> Experiment:
    run = replace(experiment.run, out=str(out), start=str(start))
    return replace(experiment, run=run, codec=replace(experiment.codec, **changes))


def rounds(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def test_a_run_that_starts_from_another_begins_where_that_one_ended(
    first: tuple[Experiment, dict[str, Any]], tmp_path: Path
) -> None:
    experiment, result = first
    run = Path(experiment.run.out)
    prepared = prepare(following(experiment, tmp_path / "b", run), tiny.Silent())
    assert np.array_equal(prepared.start, SavedRun(run).values)  # type: ignore[union-attr]
    second = in_process_run.run(following(experiment, tmp_path / "b", run))
    assert second["quality"]["before"] == result["quality"]["final"]
    assert second["final_values_sha256"] != result["final_values_sha256"]


def test_a_saved_model_starts_the_same_run_as_the_run_it_came_from(
    first: tuple[Experiment, dict[str, Any]], tmp_path: Path
) -> None:
    experiment, _ = first
    run = Path(experiment.run.out)
    SavedRun(run).load().save_pretrained(tmp_path / "small")
    by_run = in_process_run.run(following(experiment, tmp_path / "b", run))
    by_model = in_process_run.run(following(experiment, tmp_path / "c", tmp_path / "small"))
    assert by_model["final_values_sha256"] == by_run["final_values_sha256"]


@pytest.mark.parametrize("downlink", ["delta", "full"])
def test_the_first_round_of_a_run_that_starts_elsewhere_pays_for_the_values(
    first: tuple[Experiment, dict[str, Any]], tmp_path: Path, downlink: str
) -> None:
    """All clients hold the checkpoint, and nobody holds where this run starts."""
    experiment, _ = first
    codecs = {"downlink": "int8", "downlink_mode": downlink}
    start = Path(experiment.run.out)
    in_process_run.run(following(experiment, tmp_path / "b", start, **codecs))
    plain = following(experiment, tmp_path / "c", start, **codecs)
    in_process_run.run(replace(plain, run=replace(plain.run, start="")))
    first_rounds = [rounds(tmp_path / name)[1]["downlink_bytes"] for name in ("b", "c")]
    values = SavedRun(start).plan.num_values
    clients = experiment.strategy.clients_per_round
    assert first_rounds[0] - first_rounds[1] > 0.25 * values * clients  # of int8, entropy-coded


def test_a_head_drawn_from_another_seed_is_brought_to_this_runs_start(
    first: tuple[Experiment, dict[str, Any]], tmp_path: Path
) -> None:
    experiment, result = first
    SavedRun(Path(experiment.run.out)).load().save_pretrained(tmp_path / "small")
    other = following(experiment, tmp_path / "b", tmp_path / "small")
    other = replace(other, backbone=replace(other.backbone, head_seed=5))
    second = in_process_run.run(other)
    assert second["quality"]["before"] == pytest.approx(result["quality"]["final"])


@pytest.mark.parametrize("saved", ["run", "model"])
@pytest.mark.parametrize(
    ("stage", "changes", "named"),
    [
        ("mask", {"density": 0.04}, "mask"),
        ("mask", {"rule": "largest"}, "mask"),
        ("mask", {"enabled": False}, "mask"),
        ("structure", {"preset": "lnfit"}, "structure"),
        ("structure", {"scale": 3.0}, "structure"),
        ("run", {"seed": 1}, "seed"),
    ],
)
def test_values_of_another_plan_are_refused_by_the_name_of_what_differs(
    first: tuple[Experiment, dict[str, Any]],
    tmp_path: Path,
    saved: str,
    stage: str,
    changes: dict[str, Any],
    named: str,
) -> None:
    experiment, _ = first
    start = Path(experiment.run.out)
    if saved == "model":
        SavedRun(start).load().save_pretrained(tmp_path / "small")
        start = tmp_path / "small"
    other = following(experiment, tmp_path / "b", start)
    other = replace(other, **{stage: replace(getattr(other, stage), **changes)})
    with pytest.raises(ConfigError, match=f"run.start names, are of another {named} than this"):
        prepare(other, tiny.Silent())


def test_values_on_another_checkpoint_are_refused(
    first: tuple[Experiment, dict[str, Any]], tmp_path: Path
) -> None:
    experiment, _ = first
    other = following(experiment, tmp_path / "b", Path(experiment.run.out))
    backbone = tiny.make_backbone(tmp_path / "bert", seed=1)
    other = replace(other, backbone=replace(other.backbone, model=str(backbone)))
    with pytest.raises(ConfigError, match="of another checkpoint and mask than this run's"):
        prepare(other, tiny.Silent())


def test_a_start_that_is_no_saved_part_and_one_of_a_search_are_refused(
    first: tuple[Experiment, dict[str, Any]], tmp_path: Path
) -> None:
    experiment, _ = first
    with pytest.raises(ConfigError, match=r"run\.start must be the folder of a finished run"):
        prepare(following(experiment, tmp_path / "b", tmp_path), tiny.Silent())
    tables = {"run": {"start": "x"}, "search": {"federated": True}}
    with pytest.raises(ConfigError, match=r"run\.start names values of a structure"):
        Experiment.from_tables(tables)


def test_a_relative_start_is_found_from_where_the_run_was_started(tmp_path: Path) -> None:
    located = Experiment.from_tables({"run": {"start": "runs/a"}}).located()
    assert Path(located.run.start).is_absolute()
