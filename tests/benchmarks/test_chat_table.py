"""The chat job's table says what share of full fine-tuning's gain each method keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from suite_jobs import suite_of

from benchmarks.cell import Cell
from benchmarks.chat_table import chat_table
from benchmarks.suite_cell import SuiteCell
from benchmarks.suite_file import read_suite
from fedpet.config import Experiment
from fedpet.config.builtin import experiment_file
from fedpet.errors import ConfigError

ENDS = {"full": 40.0, "mask": 46.0}  # from 100
SIZES = {"full": 4_000_000, "mask": 1_000}


def pretend(cell: Cell) -> dict[str, Any]:
    """A run whose perplexity falls from 100 to the method's, most at the middle rate."""
    assert isinstance(cell, SuiteCell)
    assert cell.rate is not None
    away = 0.0 if cell.rate.learning_rate in (0.001, 0.1) else 5.0
    end = ENDS[cell.method] + away
    result = {
        "run": {"method": cell.method, "seed": cell.seed, "status": "ok"},
        "quality": {"metric": "perplexity", "before": 100.0, "final": end},
        "model": {"communicated_values": SIZES[cell.method]},
        "communication": {
            "total_bytes": SIZES[cell.method],
            "uplink_bytes_per_client_round": 10.0,
            "downlink_bytes_per_client_round": 20.0,
            "dense_fedavg_total_bytes": 4_000_000,
        },
        "time": {"processor_seconds": 1.0},
    }
    if cell.also:
        result["also"] = {"replies": {"initial": 90.0, "final": end}}
    return result


def content(**changes: Any) -> dict[str, Any]:
    return {
        "experiment": "chat",
        "tune-seed": 3,
        "seeds": [0, 1, 2],
        "most-rates": 5,
        "base": {"strategy": {"num-rounds": 2}},
        "datasets": {
            "chat": {
                "tune": ["data.eval-split=validation"],
                "final": ["data.eval-split=people"],
                "also": ["replies"],
            }
        },
        "methods": {
            "full": {"rate": 0.001, "set": ["backbone.dtype=float32"]},
            "mask": {"runs": "fedpet", "rate": 0.1, "set": ["structure.preset=none"]},
        },
        "work": [{"datasets": ["chat"], "methods": ["mask", "full"]}],
        **changes,
    }


def test_a_gain_is_shared_with_full_fine_tuning_on_both_kinds_of_rows(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, pretend, content=content())
    assert chat_table(suite).startswith("No cell")
    suite.complete(lambda line: None)
    full, mask = chat_table(suite).splitlines()[2:]  # by bytes, the most first
    assert "| full | 4,000,000 | 40.0 ± 0.0 | 100.0 % | 40.0 ± 0.0 | 100.0 % |" in full
    assert "| mask | 1,000 | 46.0 ± 0.0 | 90.0 % | 46.0 ± 0.0 | 88.0 % |" in mask
    assert mask.endswith("| 10 B | 20 B | 1 kB | 1/4,000 | 0.1 |")


def test_a_suite_starts_from_an_experiment_and_further_splits_are_of_reported_runs_alone(
    tmp_path: Path,
) -> None:
    suite = suite_of(tmp_path, pretend, content=content())
    dataset, method = suite.datasets["chat"], suite.methods["mask"]
    shipped = Experiment.from_file(experiment_file("chat"))
    assert suite.experiment(dataset, method).data == shipped.data
    assert suite.experiment(dataset, method).strategy.num_rounds == 2
    assert suite.tune_cell(dataset, method, 0.1).also == ()
    assert {cell.also for cell in suite.final_cells(dataset, method, 0.1)} == {("replies",)}
    assert (
        suite.tune_cell(dataset, method, 0.1).located().data
        == suite.tune_cell(dataset, method, 0.1).experiment.data
    )  # a package is in no folder
    with pytest.raises(ConfigError):
        suite_of(tmp_path, pretend, content=content(experiment="no-such-job"))


def test_the_shipped_file_reads_and_its_rows_are_of_one_base() -> None:
    suite = read_suite(Path(__file__).parents[2] / "benchmarks/chat.toml")
    (dataset,) = suite.datasets.values()
    for method in suite.methods.values():
        experiment = suite.experiment(dataset, method)
        assert experiment.strategy.clients_per_round == 4
        assert experiment.backbone.dtype == ("float32" if method.name == "full" else "bfloat16")
