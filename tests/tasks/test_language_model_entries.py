"""Language models by every door: objects in Python, the estimate, a search, an adapter of peft."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from in_process_run import run
from language_models import experiment_of, make_rows, model_of, save_model, save_tokenizer

import fedpet
from fedpet.config import Experiment
from fedpet.data.rows import NO_LABEL
from fedpet.estimate import estimate
from fedpet.export import export_run

Make = Callable[..., Experiment]
REST: dict[str, Any] = {
    "training": {"learning_rate": 0.02, "batch_size": 4},
    "clients": {"min_rows": 2},
    "strategy": {"clients_per_round": 3},
    "num_rounds": 2,
    "backend": "in-process",
    "progress": False,
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture
def experiment(rows: Path, tmp_path: Path) -> Make:
    save_model(tmp_path / "llama", "llama")

    def make(**changes: Any) -> Experiment:
        return experiment_of(tmp_path / "llama", rows, tmp_path / "run", **changes)

    return make


@pytest.mark.parametrize("adapted", [True, False], ids=["a PetModel", "a model and a PetConfig"])
def test_a_language_model_in_memory_is_trained_on_rows_in_memory(
    adapted: bool, rows: Path, tmp_path: Path
) -> None:
    lines = [json.loads(line) for line in (rows / "train.jsonl").read_text().splitlines()]
    data = fedpet.load_federated_dataset(
        lines, client_column="client", task="instruction", messages_column="messages",
        metric="perplexity", max_length=32, evaluation=0.3,
        tokenizer=save_tokenizer(tmp_path / "t"),
    )  # fmt: skip
    config = fedpet.PetConfig(
        mask=fedpet.MaskConfig(density=0.05), modules=[fedpet.LayerNormConfig()]
    )
    model = model_of("llama-tied")
    if adapted:
        done = fedpet.simulate(
            fedpet.get_pet_model(model, config), data, out=tmp_path / "run", **REST
        )
    else:
        done = fedpet.simulate(model, data, pet_config=config, out=tmp_path / "run", **REST)
    first, *_, last = done.history
    assert last["perplexity"] < first["perplexity"]
    plain: Any = done.model.merge_and_unload()
    assert type(plain) is type(model)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight


def test_texts_in_memory_are_packed_by_client(rows: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (rows / "train.jsonl").read_text().splitlines()]
    data = fedpet.load_federated_dataset(
        lines, client_column="client", task="language-modelling", metric="perplexity",
        max_length=16, evaluation=0.3, tokenizer=save_tokenizer(tmp_path / "t"),
    )  # fmt: skip
    config = fedpet.PetConfig(modules=[fedpet.LayerNormConfig()])
    done = fedpet.simulate(model_of("gpt2"), data, pet_config=config, out=tmp_path / "run", **REST)
    assert done.history[-1]["perplexity"] < done.history[0]["perplexity"]


@pytest.mark.parametrize("task", ["instruction", "language-modelling"])
def test_an_estimate_foresees_the_bytes_of_a_run(task: str, experiment: Make) -> None:
    raw = {f"codec_{way}": "float32-raw" for way in ("uplink", "downlink")}
    settings = experiment(data_task=task, **raw)
    foreseen, result = estimate(settings), run(settings)
    sent = result["communication"]
    assert foreseen.model["communicated_values"] == result["model"]["communicated_values"]
    assert foreseen.model["head_values"] == 0
    up, down = (sent[f"{way}_bytes_per_client_round"] for way in ("uplink", "downlink"))
    assert foreseen.communication["uplink_bytes_per_client_round"] == pytest.approx(up, rel=0.01)
    assert foreseen.communication["downlink_bytes_per_client_round"] == pytest.approx(
        down, rel=0.01
    )
    config = replace(settings, backbone=replace(settings.backbone))
    Path(settings.backbone.model, "model.safetensors").unlink()  # a config.json alone is enough
    assert estimate(config, num_clients=4).model == estimate(settings, num_clients=4).model


def test_a_federated_search_finds_a_structure_for_a_language_model(experiment: Make) -> None:
    settings = experiment(
        structure_preset="none", search_federated=True, search_rounds=1, search_local_steps=1,
        search_budget=64, search_batch_size=2, strategy_num_rounds=1,
    )  # fmt: skip
    result = run(settings)
    assert result["run"]["status"] == "ok"
    assert 0 < result["model"]["structure_values"] <= 64


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of peft's own
def test_an_adapter_of_peft_gives_the_merged_model_s_logits(
    experiment: Make, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    settings = experiment(mask_enabled=False, structure_preset="lora")
    run(settings)
    export_run(Path(settings.run.out), tmp_path / "adapter", "peft")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    merged = AutoModelForCausalLM.from_pretrained(Path(settings.run.out) / "model")
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    ids = torch.tensor([[1, 6, 9, 7]])
    with torch.no_grad():
        torch.testing.assert_close(
            adapted(input_ids=ids).logits, merged(input_ids=ids).logits, rtol=1e-4, atol=1e-5
        )
    assert adapted.peft_config["default"].task_type == "CAUSAL_LM"
    card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "AutoModelForCausalLM.from_pretrained" in card
    assert "num_labels" not in card


def test_a_collator_of_transformers_takes_rows_whose_tokens_are_labels(experiment: Make) -> None:
    from tiny import Silent

    from fedpet.run.prepare import prepare

    data = prepare(experiment(), Silent()).data.evaluation
    features = [data.features(index) for index in range(3)]
    longest = max(len(one["input_ids"]) for one in features)
    padded = [one["labels"] + [NO_LABEL] * (longest - len(one["labels"])) for one in features]
    assert data.batch(torch.arange(3).numpy())["labels"].tolist() == padded
