"""`fedpet search`: what it leaves, how it goes on, what it refuses, and who may use the file."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from rich.console import Console
from tiny import Silent

from fedpet import cli
from fedpet.backbone import load_backbone
from fedpet.config import BackboneConfig, Experiment, MaskConfig, SearchConfig, TrainingConfig
from fedpet.errors import ConfigError, StructureError
from fedpet.mask import build_mask
from fedpet.model import PetModel
from fedpet.plan import Plan
from fedpet.positions import mask_scope
from fedpet.report.gates import MARK, gate_html, gate_map, structure_table
from fedpet.report.places import find_places
from fedpet.search import budget_values, build_space, manual_structure, settle
from fedpet.simulations import central_search
from fedpet.simulations.federation import federate, prepare
from fedpet.simulations.local_grid import LocalGrid
from fedpet.simulations.run_folder import new_run_folder
from fedpet.simulations.search_progress import SearchProgress
from fedpet.structure import Structure

BUDGET = 600
SEARCH = ("search.epochs=2", "search.batch-size=8", "search.evaluate-every=3", "search.rate=0.01")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    rows = tiny.make_rows(folder / "rows", clients=4, rows_per_client=16)
    return tiny.make_backbone(folder / "backbone"), rows


@pytest.fixture(scope="module")
def experiment(files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment's file; its rows have no column named as its clients'."""
    backbone, rows = files
    folder = tmp_path_factory.mktemp("experiment")
    file = folder / "small.toml"
    file.write_text(
        f"""
[run]
name = "small"
cache = "{folder / "cache"}"
[backbone]
model = "{backbone}"
[data]
source = "{rows}"
max-length = 16
[population]
client-column = "nobody"
[mask]
enabled = false
[search]
budget = {BUDGET}
"""
    )
    return file


Search = Callable[..., Structure]


@pytest.fixture
def search(experiment: Path, monkeypatch: pytest.MonkeyPatch) -> Search:
    """Run the command and read its file; the last of the arguments is the file."""

    def run(out: Path, *sets: str) -> Structure:
        monkeypatch.setattr(sys, "argv", arguments(experiment, out, *sets))
        cli.main()
        return Structure.from_json(out.read_text(encoding="utf-8"))

    return run


def arguments(experiment: Path, out: Path, *sets: str) -> list[str]:
    keys = [part for key in (*SEARCH, *sets) for part in ("--set", key)]
    return ["fedpet", "search", str(experiment), *keys, "--out", str(out)]


@pytest.fixture(scope="module")
def found(experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of an uninterrupted search."""
    out = tmp_path_factory.mktemp("found") / "structure.json"
    settings = Experiment.from_file(experiment, SEARCH)
    with SearchProgress() as progress:
        central_search.search_centrally(settings, out, progress)
    return out


def test_a_search_leaves_a_structure_with_its_fingerprint_budget_gates_and_origin(
    files: tuple[Path, Path], found: Path
) -> None:
    structure = Structure.from_json(found.read_text(encoding="utf-8"))
    told = structure.provenance
    backbone = load_backbone(BackboneConfig(model=str(files[0])), num_outputs=2)
    assert structure.fingerprint == backbone.fingerprint
    assert len(structure.gates) == len(structure.modules) > 0
    assert told["method"] == "s3pet"
    assert told["space"]["name"] == "mergeable"
    assert told["budget"] == told["asked_budget"] == BUDGET
    assert told["data"] == {"source": str(files[1]), "split": "train", "rows": 64}
    assert not found.with_name("structure.json.state").exists()
    pet = PetModel(backbone, None, structure, seed=0)
    sent = sum(segment.size for segment in pet.segments if segment.kind != "head")
    assert sent == told["values"] <= BUDGET


def test_mask_and_structure_together_keep_a_budget_that_holds_both(
    files: tuple[Path, Path], search: Search, tmp_path: Path
) -> None:
    both = ("mask.enabled=true", "mask.density=0.02", "search.mask-in-budget=true")
    structure = search(tmp_path / "both.json", *both)
    told = structure.provenance
    backbone = load_backbone(BackboneConfig(model=str(files[0])), num_outputs=2)
    mask = build_mask(mask_scope(backbone.model, backbone.head), MaskConfig(density=0.02))
    pet = PetModel(backbone, mask, structure, seed=0)
    sent = {kind: 0 for kind in ("mask", "structure")}
    for segment in pet.segments:
        if segment.kind != "head":
            sent["mask" if segment.kind == "mask" else "structure"] += segment.size
    assert min(sent.values()) > 0
    assert sum(sent.values()) <= BUDGET == told["asked_budget"]
    assert told["budget"] == BUDGET - sent["mask"]
    assert told["mask_in_budget"] is True


def test_a_search_that_was_killed_goes_on_and_leaves_the_same_bytes(
    experiment: Path,
    found: Path,
    search: Search,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "again.json"
    honest = SearchProgress.step

    def stop(self: SearchProgress, step: Any) -> None:
        honest(self, step)
        if step.step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SearchProgress, "step", stop)
        patch.setattr(sys, "argv", arguments(experiment, out))
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
    assert exit_info.value.code == 130
    assert "The same command goes on" in capsys.readouterr().err
    assert not out.exists()
    assert central_search.state_file(out).exists()
    search(out)
    assert "going on from step 3" in capsys.readouterr().err
    assert out.read_bytes() == found.read_bytes()


def test_a_searched_structure_trains_in_an_experiment_and_its_gates_stay_with_the_server(
    files: tuple[Path, Path], found: Path, tmp_path: Path
) -> None:
    settings = tiny.make_experiment(
        *files, tmp_path / "run", structure_file=str(found), strategy_num_rounds=1
    )
    prepared = prepare(settings, Silent())
    structure = Structure.from_json(found.read_text(encoding="utf-8"))
    assert prepared.plan.structure == Structure(structure.modules)
    folder = new_run_folder(settings)
    result = federate(LocalGrid.of(node_settings(settings), 2), prepared, folder, Silent())
    assert result["model"]["structure_values"] == structure.provenance["values"]
    kept = Structure.from_json((folder.path / "structure.json").read_text(encoding="utf-8"))
    assert kept == structure
    assert Plan.from_bytes((folder.path / "plan.bin").read_bytes()).structure.gates == ()
    cells = find_places(folder.path).structure.cells.values()
    assert sorted(g for cell in cells for g in cell.gates) == sorted(structure.gates)

    from fedpet.report.page import page
    from fedpet.report.reading import read_report

    text = page(read_report(folder.path))
    assert "Gates of the search" in text
    assert text.count('class="chosen"') == len(structure.modules)


def node_settings(settings: Experiment) -> Any:
    from fedpet.node_settings import NodeSettings

    return NodeSettings.of(settings)


def test_random_and_manual_structures_come_under_the_same_budget_by_the_same_command(
    search: Search, tmp_path: Path
) -> None:
    by = {
        seed: search(tmp_path / f"r{seed}.json", "search.method=random", f"search.seed={seed}")
        for seed in (0, 1)
    }
    assert by[0].modules != by[1].modules
    again = search(tmp_path / "again.json", "search.method=random", "search.seed=1")
    assert again == by[1]
    manual = search(tmp_path / "manual.json", "search.method='lnfit+lora'")
    assert {spec.kind for spec in manual.modules} == {"lnfit", "lora"}
    for structure in (*by.values(), manual):
        assert 0 < structure.provenance["values"] <= BUDGET == structure.provenance["budget"]
        assert structure.fingerprint
        assert structure.gates == ()


# -- budgets -------------------------------------------------------------------------------------


def test_a_budget_in_bytes_counts_what_the_uplink_s_codec_makes_of_a_value() -> None:
    config = SearchConfig(budget="8kB", rate=0.1)
    values = {
        codec: settle(
            config,
            TrainingConfig(),
            backbone_parameters=10**6,
            bytes_per_value=central_search.bytes_per_value(codec),
        ).budget
        for codec in ("float32", "bfloat16", "int8", "int4", "eden-1")
    }
    assert values == {
        "float32": 2000, "bfloat16": 4000, "int8": 8000, "int4": 16000, "eden-1": 64000,
    }  # fmt: skip
    with pytest.raises(ConfigError, match="sends every value"):
        central_search.bytes_per_value("topk-0.1+int8")


def test_a_number_and_its_text_are_the_same_budget() -> None:
    for budget in (2000, 0.001):
        assert budget_values(budget, backbone_parameters=10**6) == budget_values(
            str(budget), backbone_parameters=10**6
        )


def test_one_budget_may_hold_the_mask_and_the_structure() -> None:
    config = SearchConfig(budget=1000, mask_in_budget=True, rate=0.1)

    def settled(mask_values: int) -> SearchConfig:
        return settle(config, TrainingConfig(), backbone_parameters=10**6, mask_values=mask_values)

    assert settled(400).budget == 600
    assert settle(
        replace(config, mask_in_budget=False), TrainingConfig(), backbone_parameters=10**6,
        mask_values=400,
    ).budget == 1000  # fmt: skip
    with pytest.raises(StructureError, match="the mask alone has 1000"):
        settled(1000)


def test_a_search_without_rates_of_its_own_takes_those_of_training_by_kind() -> None:
    training = TrainingConfig(learning_rate=0.2, learning_rates=("head=0.01", "mask=0.002"))
    settled = settle(SearchConfig(budget=5), training, backbone_parameters=10)
    assert [settled.rate_of(kind) for kind in ("lora", "head", "mask")] == [0.2, 0.01, 0.002]
    own = settle(SearchConfig(budget=5, rate=0.5), training, backbone_parameters=10)
    assert [own.rate_of(kind) for kind in ("lora", "head")] == [0.5, 0.5]


# -- manual structures ---------------------------------------------------------------------------


def test_a_manual_structure_is_whole_where_it_fits_and_filled_from_the_top_where_not(
    files: tuple[Path, Path],
) -> None:
    backbone = load_backbone(BackboneConfig(model=str(files[0])), num_outputs=2)
    model, head = backbone.model, backbone.head
    everything = 4 * 32  # two norms a layer; that of the embeddings is no position
    whole = manual_structure(model, "lnfit", everything, head=head)
    assert whole.provenance["whole"]
    assert whole.provenance["values"] == everything
    part = manual_structure(model, "lnfit", 3 * 32 + 31, head=head)
    assert part.provenance["values"] == 3 * 32
    assert {spec.target for spec in part.modules} < {spec.target for spec in whole.modules}
    assert sum(".layer.1." in spec.target for spec in part.modules) == 2
    with pytest.raises(StructureError, match="at least one module of 'lnfit', 32 values, got 31"):
        manual_structure(model, "lnfit", 31, head=head)


def test_a_manual_lora_takes_the_highest_rank_that_fits_and_keeps_alpha(
    files: tuple[Path, Path],
) -> None:
    backbone = load_backbone(BackboneConfig(model=str(files[0])), num_outputs=2)
    structure = manual_structure(backbone.model, "lora", 3 * 4 * 32 + 100, head=backbone.head)
    assert {(spec.rank, spec.rank * spec.scale) for spec in structure.modules} == {(3, 16.0)}
    assert structure.provenance["values"] == 3 * 4 * 32
    biases = manual_structure(backbone.model, "hiwi-bias", 10**6, head=backbone.head)
    assert {spec.rank for spec in biases.modules} == {1}  # a higher one sends no more


# -- pictures ------------------------------------------------------------------------------------


def shown(structure: Structure, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(structure_table(structure))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_the_heat_map_has_every_candidate_and_marks_the_chosen_ones(found: Path) -> None:
    structure = Structure.from_json(found.read_text(encoding="utf-8"))
    heat = gate_map(structure)
    assert heat is not None
    assert heat.layers == ("0", "1", "–")
    assert len(heat.cells) == len(structure.provenance["candidates"])
    assert sum(gate.chosen for gate in heat.cells.values()) == len(structure.modules)
    assert "ffn-up hiwi-weight" in heat.rows
    text = shown(structure, 80)
    marks = sum(line.count(MARK) for line in text.splitlines() if "chosen" not in line)
    assert marks == len(structure.modules)
    assert all(row in text for row in heat.rows)
    assert max(map(len, text.splitlines())) <= 80
    html = gate_html(structure, 0.6)
    assert html.count("<td") - html.count('class="none"') == len(heat.cells)


def test_a_heat_map_wider_than_the_terminal_goes_on_below(found: Path) -> None:
    structure = Structure.from_json(found.read_text(encoding="utf-8"))
    heat = gate_map(structure)
    assert heat is not None
    text = shown(structure, max(map(len, heat.rows)) + 8)
    assert text.count("ffn-up lora") == 2  # one layer at a time; the third has no ffn


def test_a_structure_without_gates_has_no_heat_map(
    found: Path, search: Search, tmp_path: Path
) -> None:
    structure = search(tmp_path / "r.json", "search.method=random")
    assert gate_map(structure) is None
    assert gate_html(structure, 0.6) == ""
    assert "random" in shown(structure, 80)
    searched = Structure.from_json(found.read_text(encoding="utf-8"))
    strange = replace(searched, provenance={"candidates": [{"gate": "high"}]})
    assert gate_map(strange) is None


# -- bad input, as the command line says it ------------------------------------------------------


Refused = Callable[..., str]


@pytest.fixture
def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Refused:
    """Run a command that must end with exit code 2 and one line; give the line."""

    def run(*command: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", list(command))
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        assert exit_info.value.code == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        assert not (tmp_path / "runs").exists()
        [line] = [line for line in said.splitlines() if line.startswith("Error: ")]
        return line

    return run


def test_a_budget_that_does_not_fit_the_space_is_refused_with_the_bound(
    experiment: Path, refused: Refused, tmp_path: Path, files: tuple[Path, Path]
) -> None:
    backbone = load_backbone(BackboneConfig(model=str(files[0])), num_outputs=2)
    everything = build_space(backbone.model, head=backbone.head).num_values
    out = tmp_path / "s.json"
    said = refused(*arguments(experiment, out, "search.budget=31"))
    assert "at least the smallest candidate of 'mergeable', 32 values" in said
    assert said.endswith("Raise it, or lower the rank.")
    said = refused(*arguments(experiment, out, "search.budget=1000000"))
    assert f"must be below the {everything} values of the whole space" in said
    assert "nothing to choose" in said
    said = refused(*arguments(experiment, out, "search.budget='a lot'"))
    assert "a fraction of the backbone below 1 (0.0001)" in said
    assert "8kB" in said
    assert not out.exists()


def test_a_search_is_refused_where_its_file_stands_or_its_settings_mean_nothing(
    experiment: Path, found: Path, refused: Refused, tmp_path: Path
) -> None:
    out = tmp_path / "s.json"
    assert "is there already: name another with --out" in refused(*arguments(experiment, found))
    said = refused(*arguments(experiment, out, "search.method=magic"))
    assert "search.method must be s3pet, random, or presets" in said
    assert "mergeable, s3pet-mix" in refused(*arguments(experiment, out, "search.space=all"))
    assert "unknown key in [search]" in refused(*arguments(experiment, out, "search.buget=1"))
    state = central_search.state_file(out)
    state.write_bytes(b"of something else")
    assert "is not the state of a search" in refused(*arguments(experiment, out))


def test_a_structure_of_another_backbone_is_refused_before_anything_is_run(
    files: tuple[Path, Path], found: Path, refused: Refused, tmp_path: Path
) -> None:
    said = refused(*simulate(files, tmp_path, altered(found, tmp_path, fingerprint="ab" * 32)))
    assert "was found on the checkpoint abababababab" in said
    assert "Take that checkpoint, or search again on this one." in said


def test_a_structure_s_file_of_a_newer_schema_or_of_nothing_is_refused(
    files: tuple[Path, Path], found: Path, refused: Refused, tmp_path: Path
) -> None:
    said = refused(*simulate(files, tmp_path, altered(found, tmp_path, schema=2)))
    assert "reads structures up to schema 1, the file has schema 2" in said
    assert "update this one" in said
    nothing = tmp_path / "nothing.json"
    assert "nothing.json" in refused(*simulate(files, tmp_path, nothing))
    nothing.write_bytes(b"\xff\xfe{")
    assert "nothing.json" in refused(*simulate(files, tmp_path, nothing))


def altered(file: Path, folder: Path, **changes: object) -> Path:
    table = json.loads(file.read_text(encoding="utf-8"))
    path = folder / "altered.json"
    path.write_text(json.dumps({**table, **changes}), encoding="utf-8")
    return path


def simulate(files: tuple[Path, Path], folder: Path, structure: Path) -> list[str]:
    keys = (
        f"backbone.model='{files[0]}'",
        f"data.source='{files[1]}'",
        f"run.cache='{folder / 'cache'}'",
        f"structure.file='{structure}'",
    )
    return ["fedpet", "simulate", *(part for key in keys for part in ("--set", key))]
