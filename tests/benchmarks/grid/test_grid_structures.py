"""The benchmark of federated search compares like with like, and adds up what it shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny

from benchmarks.cell import Cell
from benchmarks.experiment_grid import ExperimentCell
from benchmarks.tables import overlaps, read_grid, summary
from fedpet.errors import ConfigError
from fedpet.pet.structure import Structure

REPOSITORY = Path(__file__).resolve().parents[3]

SHIPPED = REPOSITORY / "benchmarks" / "federated_search.toml"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table over tiny files."""
    import tomli_w

    folder = tmp_path_factory.mktemp("table")
    backbone = tiny.make_backbone(folder / "backbone")
    rows = tiny.make_rows(folder / "rows")
    tables = tiny.make_experiment(backbone, rows, folder / "run").to_tables()
    tables["run"]["out"] = ""
    (folder / "tiny.toml").write_text(tomli_w.dumps(tables), encoding="utf-8")
    path = folder / "table.toml"
    path.write_text(
        """
experiment = "tiny.toml"
set = ["mask.enabled=false", "search.budget=600", "search.learning-rate=0.01", "search.epochs=1"]
learning-rates = [0.01, 0.03]
[tune]
split = "validation"
seed = 3
[final]
split = "test"
seeds = [0, 1]
[methods.federated]
runs = "fedpet"
set = ["search.federated=true", "search.seed={seed}"]
rates-of = "central"
[methods.central]
runs = "fedpet"
set = ["search.seed={seed}"]
structure = "searched"
[methods.random]
runs = "fedpet"
set = ["search.method=random", "search.seed={draw}"]
structure = "drawn"
draws = 2
""",
        encoding="utf-8",
    )
    return path


def test_the_methods_differ_in_their_structure_alone() -> None:
    grid = read_grid(SHIPPED)
    cells = {method.name: grid.final_cells(method)[1].settings() for method in grid.methods}
    for settings in cells.values():
        assert settings["run"] == {
            "seed": 1, "device": "cpu", "start": "", "evaluation-dtype": "float32"
        }  # fmt: skip
        assert settings["search"]["budget"] == 0.001
        settings.pop("search")
        settings["structure"].pop("file")
    assert cells["federated"] == cells["central"] == cells["random"]


def test_a_table_is_worked_off_cell_by_cell_and_says_what_was_sent_and_shared(file: Path) -> None:
    ran: list[str] = []

    def run(cell: Cell) -> dict[str, Any]:
        if not isinstance(cell, ExperimentCell):
            return cell.run()
        ran.append(cell.name)
        assert cell.rate is not None
        search = cell.experiment.search
        if search.federated:
            modules, sent = [["lnfit", "a"], ["lora", f"b{search.seed}"]], 1000
        else:
            found = Structure.from_json(Path(cell.experiment.structure.file).read_text())
            modules, sent = [["lnfit", "a"], ["lora", "c"]], 0
            assert found.provenance["values"] <= 600
        training = {"total_bytes": 500}
        kinds = {"by_kind": {"search": {"total_bytes": sent}, "training": training}}
        return {
            "run": {"status": "ok", "method": "fedpet"},
            "quality": {"metric": "accuracy", "final": 0.5 + cell.rate.learning_rate},
            "communication": {"total_bytes": 500 + sent, **(kinds if sent else {})},
            "model": {"structure_values": 590},
            "final_values_sha256": cell.name,
            "modules": modules,
        }

    said: list[str] = []
    job = read_grid(file, say=said.append, run=run)
    job.complete()
    tuned = {name.partition("-")[0] for name in ran if name.startswith("tune/")}
    assert tuned == {"tune/central", "tune/random0"}  # "federated" takes the rate of "central"
    assert len([name for name in ran if name.startswith("tune/")]) == 2 * len(tuned)
    finals = sorted(name for name in ran if name.startswith("final/"))
    assert finals == [
        *(f"final/{method}-seed{seed}" for method in ("central", "federated") for seed in (0, 1)),
        *(f"final/random{draw}-seed{seed}" for draw in (0, 1) for seed in (0, 1)),
    ]
    ran.clear()
    job.complete()
    assert not ran
    rows = {row["method"]: row for row in summary(job)}
    assert rows["federated"]["search"] == 1000
    assert rows["central"]["search"] == 0
    assert {row["training"] for row in rows.values()} == {500}
    assert {row["set_to"] for row in rows.values()} == {"0.03"}
    alike = dict(overlaps(job))
    assert alike["federated, seeds"] == pytest.approx(1 / 3)
    assert alike["central, seeds"] == 1.0
    assert alike["federated and central"] == pytest.approx(1 / 3)
    assert job.check(2, ("final",))
    text = file.read_text(encoding="utf-8")
    other = file.with_name("table.toml")  # the same results
    other.write_text(text.replace("search.epochs=1", "search.epochs=2"), encoding="utf-8")
    with pytest.raises(ConfigError, match="was made with other settings"):
        read_grid(other, say=said.append, run=run).complete(("structures",))
    other.write_text(text, encoding="utf-8")


def test_runs_before_their_structures_are_refused(file: Path, tmp_path: Path) -> None:
    other = file.with_name("elsewhere.toml")
    other.write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(ConfigError, match="Run the phase 'structures' first"):
        read_grid(other).complete(("tune",))


def test_the_shipped_cells_read_although_the_folder_of_the_benchmarks_has_moved() -> None:
    """Their settings name structures below a folder that was elsewhere when they were run."""
    grid = read_grid(SHIPPED)
    assert [row["method"] for row in summary(grid)] == ["federated", "central", "random"]
    assert len(overlaps(grid)) == 6


def test_rates_that_would_be_settled_on_results_are_refused(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    other = file.with_name("other.toml")
    other.write_text(text.replace('"validation"', '"test"'), encoding="utf-8")
    with pytest.raises(ConfigError, match="no result is reported on"):
        read_grid(other)
