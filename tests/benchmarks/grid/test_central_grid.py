"""The table of structures: what is compared with what, on which rows, and how it goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tomli_w
from report_runs import to_text

from benchmarks import search_step
from benchmarks.central_grid import CentralCell, CentralGrid, Place
from benchmarks.central_training import sample
from benchmarks.grid import PHASES, Method
from benchmarks.rate import Rate
from benchmarks.tables import final_table, read_grid, summary, tuning_table
from fedpet.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A backbone, and a folder of two data sets."""
    folder = tmp_path_factory.mktemp("tiny")
    for name in ("one", "two"):
        rows = tiny.make_rows(folder / "data" / name, clients=4, rows_per_client=20)
        shutil.copy(rows / "test.jsonl", rows / "more.jsonl")
    return tiny.make_backbone(folder / "backbone"), folder / "data"


@pytest.fixture
def table_file(files: tuple[Path, Path], tmp_path: Path) -> Callable[..., Path]:
    def make(**changes: Any) -> Path:
        tables: dict[str, Any] = {
            "budgets": [400],
            "train-rows": 48,
            "max-length": 16,
            "backbone": {"model": str(files[0])},
            "datasets": {
                "one": {"metric": "accuracy", "eval-splits": ["test"]},
                "two": {"metric": "matthews", "eval-splits": ["test", "more"]},
            },
            "search": {"epochs": 1, "batch-size": 8, "learning-rate": 0.01, "evaluate-every": 2},
            "training": {"local-epochs": 1, "batch-size": 8},
            "tune": {
                "rows": 20,
                "seed": 7,
                "learning-rates": [0.01, "0.1 head=0.01"],
                "presets": ["lnfit", "lora"],
            },
            "final": {"seeds": [0, 1], "random-structures": 2},
        }
        path = tmp_path / "small.toml"
        path.write_text(tomli_w.dumps({**tables, **changes}), encoding="utf-8")
        return path

    return make


class Fake:
    """Stands for training: a score by the cell's name, and which cells were asked for."""

    def __init__(self, score: Callable[[CentralCell], float] = lambda cell: 0.5) -> None:
        self.score = score
        self.cells: list[CentralCell] = []

    def __call__(self, cell: Any) -> dict[str, Any]:
        self.cells.append(cell)
        modules = [{"kind": "lnfit", "target": f"layer.{cell.search.seed}"}]
        return {
            "score": self.score(cell),
            "sha256": cell.name,
            "structure_values": 384,
            "structure": {"modules": modules},
        }

    @property
    def ran(self) -> list[str]:
        return [cell.name for cell in self.cells]


def job(path: Path, run: Any = None, data: Path = Path("nowhere")) -> CentralGrid:
    grid = read_grid(path, data=data, run=run)
    assert isinstance(grid, CentralGrid)
    grid.cache = path.parent / "cache"
    return grid


def row(grid: CentralGrid, name: str) -> Method:
    return next(method for method in (*grid.methods, *grid.tuned) if method.name == name)


def test_every_method_has_the_same_grid_and_the_final_runs_every_seed(table_file: Any) -> None:
    fake = Fake()
    whole = job(table_file(), fake)
    whole.complete()
    assert len(set(fake.ran)) == len(fake.ran)
    by_phase = {phase: [c for c in fake.cells if c.name.startswith(phase)] for phase in PHASES}
    assert len(by_phase["structures"]) == 2 * 3  # data sets, seeds and that of tuning
    assert len(by_phase["tune"]) == 2 * 4 * 2  # searched, random, two presets; rates
    assert len(by_phase["final"]) == 2 * 2 * (1 + 2 + 1 + 1)
    assert [row["method"] for place in whole.places for row in summary(whole, place)] == [
        "searched", "random", "manual", "transfer",
    ] * 2  # fmt: skip


def test_no_rate_is_settled_on_rows_structures_or_seeds_that_are_reported(table_file: Any) -> None:
    fake = Fake()
    job(table_file(), fake).complete()
    tuned = [cell for cell in fake.cells if cell.name.startswith("tune")]
    final = [cell for cell in fake.cells if cell.name.startswith("final")]
    assert all(cell.rows.eval_splits == () and cell.rows.held_rows for cell in tuned)
    assert all(cell.rows.eval_splits for cell in final)
    assert {cell.seed for cell in tuned}.isdisjoint(cell.seed for cell in final)
    seeds = [{c.search.seed for c in cells if c.search.method == "random"}
             for cells in (tuned, final)]  # fmt: skip
    assert seeds[0].isdisjoint(seeds[1])
    assert len(seeds[1]) == 4  # every seed draws its own
    train, held = sample(tuned[0].rows, 80)
    assert len(train) == 48
    assert len(held) == 20
    assert not set(train) & set(held)
    assert np.array_equal(train, sample(final[0].rows, 80)[0])


def test_the_manual_structure_and_every_rate_are_the_best_of_tuning(table_file: Any) -> None:
    scores = {"lora-lr0.1-head0.01": 0.9, "searched-lr0.1-head0.01": 0.8}
    fake = Fake(lambda c: next((s for end, s in scores.items() if c.path.stem.endswith(end)), 0.5))
    whole = job(table_file(), fake)
    whole.complete()
    place = whole.places[0]
    high = Rate(0.1, ("head=0.01",))
    assert whole.settled(row(whole, "manual"), place) == ("lora", high)
    assert whole.settled(row(whole, "searched"), place)[1] == high
    assert whole.settled(row(whole, "transfer"), place)[1] == high
    assert whole.settled(row(whole, "random"), place)[1] == Rate(0.01)  # of equals the smaller
    [manual, _] = [c for c in fake.cells if c.path.stem.startswith("one-b400-manual")]
    assert manual.search.method == "lora"
    assert manual.training is not None
    assert manual.training.rate_of("head") == 0.01
    assert "lora" in to_text(final_table(whole), 160)
    assert "0.9000" in to_text(tuning_table(whole), 160)


def test_transfer_trains_the_other_data_set_s_structure_of_the_same_seed(table_file: Any) -> None:
    fake = Fake()
    job(table_file(), fake).complete()
    sources = {c.path.stem: c.needs for c in fake.cells if "-from-" in c.path.stem}
    assert {
        name: path.stem for name, path in sources.items() if path is not None
    } == {
        f"{to}-b400-from-{origin}-seed{seed}": f"{origin}-b400-seed{seed}"
        for to, origin in (("one", "two"), ("two", "one"))
        for seed in (0, 1)
    }  # fmt: skip


def test_a_variant_of_the_search_is_a_row_of_its_own_at_the_searched_ones_rate(
    table_file: Any,
) -> None:
    fake = Fake(lambda cell: 0.6 if "annealed" in cell.name else 0.5)
    whole = job(table_file(variants={"annealed": {"beta-end": 0.1}}), fake)
    whole.complete()
    searches = {c.path.stem: c.search for c in fake.cells if c.name.startswith("structures")}
    assert searches["one-b400-annealed-seed0"] == replace(searches["one-b400-seed0"], beta_end=0.1)
    final = {c.path.stem: c for c in fake.cells if c.name.startswith("final/one")}
    found_by = final["one-b400-annealed-seed1"].needs
    assert found_by is not None
    assert found_by.stem == "one-b400-annealed-seed1"
    assert not any("annealed" in c.name for c in fake.cells if c.name.startswith("tune"))
    [found] = [r for r in summary(whole, whole.places[0]) if r["method"] == "annealed"]
    assert found["mean"] == pytest.approx(0.6)
    assert "+0.1000" in to_text(final_table(whole), 160)


def test_what_is_there_is_not_run_again_and_other_settings_are_refused(table_file: Any) -> None:
    path = table_file()
    job(path, Fake()).complete(["structures"])
    again = Fake()
    job(path, again).complete()
    assert not [name for name in again.ran if name.startswith("structures")]
    other = table_file(**{"train-rows": 40})
    with pytest.raises(ConfigError, match=r"rows\.train_rows was 48, is 40"):
        job(other, Fake()).complete()
    with pytest.raises(ConfigError, match=r"search\.epochs was 1, is 2"):
        job(
            table_file(search={"epochs": 2, "batch-size": 8, "learning-rate": 0.01}), Fake()
        ).complete()


def test_a_key_that_a_stored_cell_did_not_know_had_its_default(table_file: Any) -> None:
    whole = job(table_file(), Fake())
    whole.complete(["structures"])
    cell = next(whole.cells("structures"))
    content = json.loads(cell.path.read_text())
    del content["settings"]["search"]["hard"]
    cell.path.write_text(json.dumps(content))
    assert cell.read() is not None


def test_final_runs_before_tuning_are_refused(table_file: Any) -> None:
    with pytest.raises(ConfigError, match="Run the phase 'tune' first"):
        job(table_file(), Fake()).complete(["final"])
    assert job(table_file(), Fake()).known_cells("final") == []


def test_a_check_notes_whether_cells_come_out_the_same(table_file: Any) -> None:
    path = table_file()
    job(path, Fake()).complete()
    assert job(path, Fake()).check(3)
    assert not job(path, Fake(lambda cell: 0.1)).check(1, ["final"])
    notes = json.loads((path.parent / "results" / "small" / "checks.json").read_text())
    assert [note["same"] for note in notes] == [True] * 3 + [False]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"tune": {"rows": 9, "seed": 0, "learning-rates": [0.1], "presets": ["lora"]}}, "seeds"),
        ({"budgets": []}, "needs datasets, budgets"),
        ({"wrong": 1}, "unknown key 'wrong'"),
        ({"search": {"epoch": 1}}, "unknown key in .search."),
    ],
)
def test_a_table_that_would_mislead_is_refused(table_file: Any, changes: Any, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        read_grid(table_file(**changes))


def test_the_table_in_the_repository_reads_and_its_data_are_not_in_it() -> None:
    table = job(REPOSITORY / "benchmarks" / "search.toml")
    assert [dataset.name for dataset in table.datasets] == ["sst2", "cola"]
    assert table.train_rows == 2000
    assert len(table.seeds) == table.random_structures == 3


def test_real_cells_keep_the_budget_and_come_out_again_to_the_bit(
    table_file: Any, files: tuple[Path, Path], tmp_path: Path
) -> None:
    whole = job(table_file(), data=files[1])
    place = Place(whole.datasets[0], 400)
    found = whole.structure_cell(place, 7)
    with pytest.raises(ConfigError, match="Run the phase 'structures' first"):
        whole.complete(["tune"])
    result = found.run()
    assert 0 < result["values"] <= 400
    assert found.run()["sha256"] == result["sha256"]
    found.path.parent.mkdir(parents=True)
    found.path.write_text(json.dumps({"result": result}))
    for method in ("searched", "random", "lora"):
        cell = whole.tune_cells(row(whole, method), place)[1]
        first, second = (cell.run() for _ in range(2))
        assert first["sha256"] == second["sha256"]
        assert 0 < first["structure_values"] <= 400
        assert first["values_by_kind"]["head"] == 2 * 32 + 2
        assert first["evaluated_rows"] == 20


def test_the_search_step_is_measured_against_plain_steps_of_the_same_candidates(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "step.json"
    monkeypatch.setattr(search_step, "BAR", 1e9)
    model = str(files[0])
    arguments = ["--model", model, "--spaces", "mergeable", "--rounds", "1", "--batch", "2x4"]
    assert search_step.main([*arguments, "--out", str(out)]) == 0
    [row] = json.loads(out.read_text())["rows"]
    assert list(row["steps"]) == ["plain", "gated", "first-order", "second-order"]
    assert row["steps"]["plain"]["plain_steps"] == 1.0
    held = row["steps"]["second-order"]["persistent_bytes"]
    assert held < row["backbone_bytes"]  # no second backbone between steps
