"""The card of a model: its front matter reads, its figures are the run's, no row stands in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import in_process_run
import pytest
import tiny
from huggingface_hub import ModelCard

from fedpet.export import export_run
from fedpet.export.model_card import hub_name, write_adapter_card
from fedpet.utils import bundled


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("card")
    backbone, rows = tiny.make_backbone(folder / "bert"), tiny.make_rows(folder / "secret rows")
    experiment = tiny.make_experiment(
        backbone, rows, folder / "run", strategy_num_rounds=1, structure_preset="lnfit"
    )
    return folder / "run", in_process_run.run(experiment)


def test_a_runs_model_has_a_card_with_its_figures(run: tuple[Path, dict[str, Any]]) -> None:
    folder, result = run
    card = ModelCard.load(folder / "model" / "README.md")
    assert card.data.library_name == "transformers"
    [measured] = card.data.eval_results or []
    assert measured.metric_type == "accuracy"
    assert measured.metric_value == result["quality"]["final"]
    assert card.data.to_dict().get("license") is None  # it is not known
    for key in ("uplink_bytes", "downlink_bytes", "plan_bytes", "total_bytes"):
        assert f"{result['communication'][key]:,}" in card.text
    for text in ("1 round of fedavg", "6 clients", result["final_values_sha256"], "torch 2."):
        assert text in card.text


def test_a_card_names_no_row_no_client_and_no_path(run: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = run
    text = (folder / "model" / "README.md").read_text()
    rows = folder.parent / "secret rows"
    for line in rows.joinpath("train.jsonl").read_text().splitlines():
        assert json.loads(line)["text"] not in text
    assert "client 0" not in text
    assert "secret" not in text
    assert str(folder.parent) not in text


@pytest.mark.parametrize("format", ["merged", "peft"])
def test_an_exported_folder_has_the_same_figures(
    run: tuple[Path, dict[str, Any]], tmp_path: Path, format: str
) -> None:
    folder, result = run
    export_run(folder, tmp_path / "out", format)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == {"merged": "transformers", "peft": "peft"}[format]
    assert f"{result['communication']['total_bytes']:,}" in card.text
    if format == "merged":
        assert card.content == (folder / "model" / "README.md").read_text()
    else:
        assert "PeftModel.from_pretrained" in card.text


def test_a_run_without_a_result_and_one_that_diverged_have_cards_too(
    run: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, _ = run
    written = folder / "result.json"
    before = written.read_text()
    try:
        diverged = json.loads(before)
        diverged["quality"] |= {"final": None, "before": None}
        written.write_text(json.dumps(diverged))
        export_run(folder, tmp_path / "nan")
        assert ModelCard.load(tmp_path / "nan" / "README.md").data.eval_results is None
    finally:
        written.write_text(before)
    write_adapter_card(tmp_path, "org/model", peft_type="LORA")
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.base_model, card.data.tags[-1]) == ("org/model", "lora")


def test_only_a_name_on_the_hub_is_the_base_model(tmp_path: Path) -> None:
    assert hub_name("bundled") == hub_name(f"package:{bundled.name_of(bundled.MODEL)}")
    assert hub_name("bundled") == "sentence-transformers/all-MiniLM-L6-v2"
    assert hub_name("org/model") == "org/model"
    assert hub_name("bert-base-uncased") == "bert-base-uncased"
    for local in (str(tmp_path), "./here", "~/model", "package:other", "a/b/c", ""):
        assert hub_name(local) == ""
