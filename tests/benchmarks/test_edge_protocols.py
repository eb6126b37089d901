"""FlowerTune's way beside fedpet's: bytes beforehand, drop-outs, and EdgeFlowerTune's protocols."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from language_models import experiment_of, make_rows, save_model

from benchmarks import edge_protocols, flowertune
from benchmarks.edge_protocols import EdgeRun, as_text
from fedpet.errors import InputError

START = 0.0


def line(number: int, metric: float | None, **more: Any) -> dict[str, Any]:
    sizes = {"uplink_bytes": 100, "downlink_bytes": 200, "plan_bytes": 0}
    counts = {"clients": 4, "replies": 4, "aggregated": True}
    seconds = {"evaluation_seconds": 1.0 if metric is not None else 0.0}
    return {"round": number, "metric": metric, **sizes, **counts, **seconds, **more}


def write_run(folder: Path, lines: list[dict[str, Any]], metric: str = "perplexity") -> Path:
    folder.mkdir()
    before = line(0, 100.0, uplink_bytes=0, downlink_bytes=0, clients=0, replies=0)
    text = "".join(json.dumps(one) + "\n" for one in [before, *lines])
    (folder / "rounds.jsonl").write_text(text, encoding="utf-8")
    task = "classification" if metric == "accuracy" else "language-modelling"
    settings = {"run": {"name": folder.name}, "data": {"metric": metric, "task": task}}
    (folder / "config.toml").write_text(tomli_w.dumps(settings), encoding="utf-8")
    return folder


def test_a_budget_buys_the_last_evaluation_before_it_is_spent(tmp_path: Path) -> None:
    run = EdgeRun.read(write_run(tmp_path / "a", [line(1, 60.0), line(2, None), line(3, 50.0)]))
    assert [run.under(bytes_) for bytes_ in (0, 299, 300, 899, 900)] == [100, 100, 60, 60, 50]
    assert run.spent == 900


def test_a_target_costs_the_bytes_until_an_evaluation_reaches_it(tmp_path: Path) -> None:
    run = EdgeRun.read(write_run(tmp_path / "a", [line(1, 60.0), line(2, 55.0), line(3, 58.0)]))
    assert [run.bytes_to(target) for target in (100.0, 60.0, 57.0, 54.0)] == [0, 300, 600, None]
    rising = EdgeRun.read(write_run(tmp_path / "b", [line(1, 101.0)], metric="accuracy"))
    assert [rising.bytes_to(target) for target in (100.5, 102.0)] == [300, None]


def test_searches_and_measuring_cost_bytes_and_are_no_training_rounds(tmp_path: Path) -> None:
    lines = [line(1, None, kind="search"), line(1, 60.0), line(1, None, kind="evaluation")]
    run = EdgeRun.read(write_run(tmp_path / "a", [*lines, line(2, 50.0, replies=1)]))
    assert run.under(900) == 60
    assert (run.asked, run.answered, run.averaged) == (8, 5, (2, 2))
    assert run.lost == pytest.approx(3 / 8)


def test_a_run_that_diverged_does_not_keep_an_earlier_metric(tmp_path: Path) -> None:
    lines = [line(1, 60.0), line(2, None, evaluation_seconds=1.0)]
    run = EdgeRun.read(write_run(tmp_path / "a", lines))
    assert str(run.final) == "nan"
    assert run.bytes_to(50.0) is None


def test_runs_of_several_metrics_or_without_evaluations_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [write_run(tmp_path / name, [line(1, 0.5)], name) for name in ("perplexity", "accuracy")]
    with pytest.raises(InputError, match="accuracy, perplexity"):
        as_text([EdgeRun.read(run) for run in runs])
    assert edge_protocols.main([str(tmp_path / "none")]) == 2
    assert "no run folder" in capsys.readouterr().err


def test_lost_updates_are_compared_with_the_same_run_in_which_none_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "model")
    settings = experiment_of(
        tmp_path / "model", make_rows(tmp_path / "rows"), tmp_path / "run",
        strategy_num_rounds=2, strategy_quorum=0.1, strategy_evaluate_every=1,
    )  # fmt: skip
    results = {}
    for name, drop in (("whole", 0.0), ("whole-drop", 0.5)):
        (tmp_path / name).mkdir()
        named = replace(settings, run=replace(settings.run, name=name))
        results[name] = flowertune.train(named, tmp_path / name, drop)
    assert not results["whole"]["refused"]
    assert {one["reason"] for one in results["whole-drop"]["refused"]} == {"it dropped out"}
    out = tmp_path / "found.json"
    assert edge_protocols.main([*(str(tmp_path / name) for name in results), f"--out={out}"]) == 0
    printed = capsys.readouterr().out
    assert as_text([EdgeRun(**run) for run in json.loads(out.read_text())]) == printed.strip()
    said = printed.splitlines()
    [dropped] = [row for row in said if row.startswith("| whole-drop") and " of 2" in row]
    lost = len(results["whole-drop"]["refused"]) / 6
    assert f"| {100 * lost:.1f} % |" in dropped
    assert f"{results['whole']['quality']['final']:.4f} |" in dropped


def test_a_key_that_came_after_a_run_has_its_default(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / name, [line(1, 60.0, replies=replies)])
        for name, replies in (("before", 4), ("after", 2))
    ]
    later = tomllib.loads((runs[1] / "config.toml").read_text()) | {"backbone": {"bits": 0}}
    (runs[1] / "config.toml").write_text(tomli_w.dumps(later), encoding="utf-8")
    shown = as_text([EdgeRun.read(run) for run in runs])
    assert "| after | 50.0 % | 1 of 1 | 60.0000 | 60.0000 |" in shown


def test_flowertune_s_general_task_sends_what_its_factors_weigh() -> None:
    theirs = flowertune.flowertune_tables()
    assert theirs["strategy"]["num-rounds"] == 200
    assert theirs["strategy"]["clients-per-round"] == flowertune.CLIENTS_A_ROUND
    ours = flowertune.as_ours(theirs)
    for part in ("clients", "strategy", "data", "backbone"):
        assert ours[part] == theirs[part]
    assert ours["training"]["batch-size"] == theirs["training"]["batch-size"]


def test_the_shortened_runs_differ_in_what_is_trained_and_sent_alone() -> None:
    made = {name: flowertune.shortened(name, 4) for name in flowertune.RATES}
    assert made["flowertune"].structure.preset == "lora-factors"
    assert made["flowertune"].codec.uplink == "float32-raw"
    assert made["fedpet"].mask.density == 0.001
    for one in made.values():
        same = made["fedpet"]
        assert (one.clients, one.strategy, one.data) == (same.clients, same.strategy, same.data)
        assert one.training.schedule == "cosine"
        assert one.training.batch_size == same.training.batch_size
