"""Whole runs of language models: weights by tokens, the merged model, and what the run says."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from in_process_run import run
from language_models import MODELS, experiment_of, make_rows, save_model
from tiny import Silent

from fedpet.client.node_config import NodeConfig
from fedpet.config import Experiment
from fedpet.errors import ConfigError, RunError
from fedpet.export import merge_run
from fedpet.run.federate import prepare
from fedpet.run.local_grid import LocalGrid
from fedpet.run.prepare import Prepared
from fedpet.training.loop import train_rows
from fedpet.utils.seeds import client_id64, derive_seed

Make = Callable[..., Experiment]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in MODELS:
        save_model(folder / name, name)
    return folder


@pytest.fixture
def experiment(rows: Path, models: Path, tmp_path: Path) -> Make:
    def make(name: str = "llama-tied", **changes: Any) -> Experiment:
        return experiment_of(models / name, rows, tmp_path / "run", **changes)

    return make


def prepared_of(experiment: Experiment) -> Prepared:
    found = prepare(experiment, Silent())
    assert isinstance(found, Prepared)
    return found


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def generated(model: Any, tokens: int = 12) -> list[list[int]]:
    ids = torch.tensor([[1, 6, 9, 7], [1, 12, 4, 5]])
    with torch.no_grad():
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
            pad_token_id=2, eos_token_id=None,
        )  # fmt: skip
    answer: list[list[int]] = found.tolist()
    return answer


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("llama-tied", "instruction"),
        ("gpt2", "language-modelling"),
        pytest.param("llama", "language-modelling", marks=pytest.mark.slow),
        pytest.param("llama", "instruction", marks=pytest.mark.slow),
        pytest.param("gpt2", "instruction", marks=pytest.mark.slow),
    ],
)
def test_a_run_lowers_the_perplexity_and_its_saved_model_has_it(
    name: str, task: str, experiment: Make
) -> None:
    settings = experiment(name, data_task=task)
    result = run(settings)
    quality = result["quality"]
    assert quality["final"] < quality["before"]
    assert quality["best"] == min(point["value"] for point in quality["by_round"][1:])
    assert np.exp(quality["metrics"]["loss"]) == pytest.approx(quality["final"])
    assert quality["by_client"]["worst"] > quality["by_client"]["best"]
    assert "majority_baseline" not in quality
    assert result["data"]["classes"] == []
    assert result["model"]["head_values"] == 0
    model, evaluation = loaded(Path(settings.run.out) / "model"), prepared_of(settings).data
    batch = evaluation.evaluation.batch(np.arange(len(evaluation.evaluation)))
    with torch.no_grad():
        theirs = model(**batch).loss.item()
    assert theirs == pytest.approx(quality["metrics"]["loss"], rel=1e-4)
    assert result["data"]["evaluation_label_tokens"] == int((batch["labels"] != -100).sum())


def test_an_update_weighs_its_client_s_label_tokens(experiment: Make) -> None:
    settings = experiment(strategy_num_rounds=1, strategy_clients_per_round=4)
    updates, tokens, counts = updates_of(settings)
    assert len(set(tokens)) == 4
    assert values_of(run(settings), settings) == pytest.approx(
        np.average(updates, axis=0, weights=tokens), abs=1e-6
    )
    by_rows = replace(settings, strategy=replace(settings.strategy, weights="rows"))
    by_rows = replace(by_rows, run=replace(settings.run, out=f"{settings.run.out}-rows"))
    assert values_of(run(by_rows), by_rows) == pytest.approx(
        np.average(updates, axis=0, weights=counts), abs=1e-6
    )


def updates_of(experiment: Experiment) -> tuple[list[np.ndarray], list[int], list[int]]:
    """Train every client by hand for round 1: their values, label tokens and rows."""
    prepared = prepared_of(experiment)
    plan, pet, data = prepared.plan, prepared.pet, prepared.data
    updates, tokens, counts = [], [], []
    for client in data.clients:
        seed = derive_seed("client", plan.seed, 1, client_id64(client.id))
        pet.set_delta(torch.zeros(plan.num_values), seed=seed)
        train_rows(
            pet.model, pet.parameter_groups(), data.train, client.rows, plan.task, plan.training,
            seed=seed, factor=plan.rate_factor(1), after_step=pet.after_step,
        )  # fmt: skip
        updates.append(pet.get_delta().numpy())
        batch = data.train.batch(client.rows)
        tokens.append(int((batch["labels"] != -100).sum()))
        counts.append(len(client.rows))
    return updates, tokens, counts


def values_of(result: dict[str, Any], experiment: Experiment) -> np.ndarray:
    assert result["run"]["status"] == "ok"
    values: np.ndarray = np.load(Path(experiment.run.out) / "checkpoint" / "values.npy")
    return values


@pytest.mark.parametrize(
    "name", ["llama", "llama-tied", pytest.param("gpt2", marks=pytest.mark.slow)]
)
def test_the_merged_model_generates_the_tokens_of_the_adapted_one_and_stays_tied(
    name: str, experiment: Make, models: Path, tmp_path: Path
) -> None:
    settings = experiment(
        name, structure_preset="lnfit+lora+hiwi-weight", training_learning_rate=0.05
    )
    result = run(settings)
    prepared = prepared_of(settings)
    pet = prepared.pet
    pet.set_delta(torch.from_numpy(values_of(result, settings)), seed=prepared.plan.seed)
    adapted = generated(pet.model)
    assert adapted != generated(loaded(models / name))
    merge_run(Path(settings.run.out), tmp_path / "merged")
    tied = name != "llama"
    for folder in (Path(settings.run.out) / "model", tmp_path / "merged"):
        model = loaded(folder)
        assert generated(model) == adapted
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
        assert not (folder / "config.json").read_text().count("LABEL_")
    merged = pet.merge_and_unload()
    assert generated(merged) == adapted
    assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_embeddings_and_the_output_layer_are_neither_masked_nor_trained(
    name: str, experiment: Make, models: Path
) -> None:
    prepared = prepared_of(experiment(name, mask_density=1.0))
    assert prepared.pet.mask is not None
    names = set(prepared.pet.mask.positions)
    assert names
    assert not [n for n in names if any(word in n for word in ("embed", "lm_head", "wte", "wpe"))]
    settings = experiment(name, training_learning_rate=0.05)
    run(settings)
    before, after = loaded(models / name), loaded(Path(settings.run.out) / "model")
    for key in ("get_input_embeddings", "get_output_embeddings"):
        assert torch.equal(getattr(before, key)().weight, getattr(after, key)().weight)


def test_results_do_not_depend_on_the_number_of_nodes(experiment: Make) -> None:
    hashes = set()
    for nodes in (1, 3):
        settings = experiment()
        settings = replace(settings, run=replace(settings.run, out=f"{settings.run.out}-{nodes}"))
        grid = LocalGrid.of(NodeConfig.from_experiment(settings), nodes)
        hashes.add(run(settings, grid)["final_values_sha256"])
    assert len(hashes) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"backbone_dtype": "bfloat16"},
        {"training_gradient_checkpointing": True},
        {"training_learning_rate": "auto"},
        {"training_clients_at_once": 3},
        *(
            pytest.param(changes, marks=pytest.mark.slow)
            for changes in (
                {"strategy_name": "fedprox", "training_proximal_mu": 0.1},
                {"run_evaluation_dtype": "bfloat16"},
                {"codec_uplink": "dither-3", "codec_downlink": "dither-5"},
                {"mask_tiers": ["0.01=0.5", "0.05=0.5"]},
                {"backbone_head": "keep"},
            )
        ),
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_run_with_a_setting_of_every_stage_learns(
    changes: dict[str, Any], experiment: Make
) -> None:
    quality = run(experiment("llama", **changes))["quality"]
    assert quality["final"] < quality["before"]


@pytest.mark.parametrize("changes", [{}, {"training_padding_free": False}])
def test_checkpointing_and_the_packing_of_classifiers_move_no_value(
    changes: dict[str, Any], experiment: Make
) -> None:
    plain = run(experiment())
    settings = experiment(**(changes or {"training_gradient_checkpointing": True}))
    again = run(replace(settings, run=replace(settings.run, out=f"{settings.run.out}-again")))
    assert again["quality"]["final"] == pytest.approx(plain["quality"]["final"], rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"training_cls_only": True}, r"training\.cls-only = true skips tokens"),
        ({"training_logit_adjustment": 1.0}, r"training\.logit-adjustment goes by the shares"),
        ({"clients_partition": "dirichlet"}, r"deals rows out by label.*'column' or 'iid'"),
        ({"clients_partition": "shards"}, r"deals rows out by label"),
        ({"backbone_head": "new"}, r"backbone\.head = 'new' draws a head"),
        ({"data_metric": "accuracy"}, r"'accuracy' does not measure data\.task = 'instruction'"),
        ({"data_label_names": ["a", "b"]}, r"leave them out, since data\.task is 'instruction'"),
    ],
)
def test_settings_of_classifiers_are_refused(
    changes: dict[str, Any], sentence: str, experiment: Make
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        prepare(experiment(**changes), Silent())


def test_an_encoder_is_no_language_model(tmp_path: Path, rows: Path) -> None:
    from language_models import VOCABULARY, save_tokenizer
    from transformers import BertConfig, BertLMHeadModel

    size = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        vocab_size=len(VOCABULARY), is_decoder=False,
    )  # fmt: skip
    BertLMHeadModel(size).save_pretrained(tmp_path / "bert")
    save_tokenizer(tmp_path / "bert")
    settings = experiment_of(tmp_path / "bert", rows, tmp_path / "run")
    with pytest.raises(ValueError, match="depend on the tokens after it"):
        prepare(settings, Silent())


def test_a_checkpoint_without_its_output_layer_is_refused(tmp_path: Path, rows: Path) -> None:
    from language_models import model_of, save_tokenizer

    model_of("llama").model.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    settings = experiment_of(tmp_path / "base", rows, tmp_path / "run")
    with pytest.raises(ValueError, match=r"lacks 1 of the .* \(lm_head\.weight\)"):
        prepare(settings, Silent())


def test_losses_that_are_no_numbers_are_refused_and_nothing_is_averaged(
    experiment: Make, models: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    model = loaded(models / "llama")
    tried = prepared_of(experiment("llama")).data.evaluation  # one row, before the run begins
    shortest = int(np.argmin(tried.lengths))
    kept = tried.tokens[tried.offsets[shortest] : tried.offsets[shortest + 1]]
    with torch.no_grad():
        for word in set(range(4, 17)) - set(kept.tolist()):
            model.get_input_embeddings().weight[word] = torch.nan
    model.save_pretrained(broken)
    for file in models.joinpath("llama").iterdir():
        if not (broken / file.name).exists():
            (broken / file.name).write_bytes(file.read_bytes())
    settings = experiment("llama", backbone_model=str(broken), backbone_dtype="bfloat16")
    with pytest.raises(RunError, match="no round met its quorum"):
        run(settings)
    books = (Path(settings.run.out) / "rounds.jsonl").read_text().splitlines()
    refused = [entry for line in books for entry in json.loads(line)["refused"]]
    assert refused
    assert all("the training loss became nan" in entry["reason"] for entry in refused)


def test_the_report_speaks_of_perplexity_and_tokens_and_of_no_class(experiment: Make) -> None:
    from rich.console import Console

    from fedpet.report.loading import read_report
    from fedpet.report.page import page
    from fedpet.report.run_table import run_table

    settings = experiment()
    result = run(settings)
    console = Console(record=True, width=120)
    console.print(run_table(result))
    shown = console.export_text()
    assert "perplexity before" in shown
    assert f"{result['data']['evaluation_label_tokens']} label tokens" in shown
    assert "majority" not in shown
    text = page(read_report(Path(settings.run.out)))
    assert "perplexity" in text
    assert "majority" not in text
    assert "recall" not in text
    card = (Path(settings.run.out) / "model" / "README.md").read_text(encoding="utf-8")
    assert "text-generation" in card
    assert "perplexity" in card


def test_a_registered_loss_and_metric_see_a_language_model_s_outputs(experiment: Make) -> None:
    from language_functions import seen

    seen.clear()
    result = run(experiment(
        training_loss="language_functions:whole_loss", data_metrics=["language_functions:bits"],
    ))  # fmt: skip
    metrics = result["quality"]["metrics"]
    assert metrics["bits"] == pytest.approx(metrics["loss"] / np.log(2))
    assert seen
    assert all(logits[:2] == labels and len(logits) == 3 for logits, labels in seen)


def test_the_copy_of_a_batch_is_left_as_it_was(experiment: Make) -> None:
    prepared = prepared_of(experiment())
    rows = prepared.data.train
    batch = rows.batch(np.arange(3))
    kept = copy.deepcopy(batch)
    from fedpet.training.token_loss import token_loss

    labels = batch.pop("labels")
    token_loss(prepared.pet.model, batch, labels)
    assert torch.equal(labels, kept["labels"])
    assert batch.keys() == {"input_ids", "attention_mask"}
