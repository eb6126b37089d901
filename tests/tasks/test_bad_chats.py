"""Chats and checkpoints that cannot be used: one sentence on the command line, and nothing lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from in_process_run import run
from language_models import experiment_of, make_rows, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

Refused = Callable[..., str]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return save_model(tmp_path / "model", "llama"), make_rows(tmp_path / "rows")


def state_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(refused: Refused, model: Path, rows: Path, **changes: Any) -> str:
    """Simulate by an experiment file; checkpoint and rows stay as they were, nothing is left."""
    experiment = experiment_of(model, rows, rows.parent / "run", **changes)
    path = rows.parent / "chats.toml"
    path.write_text(tomli_w.dumps(experiment.to_tables()))
    before = [state_of(model), state_of(rows)]
    line = refused("simulate", str(path))
    assert [state_of(model), state_of(rows)] == before
    assert not (rows.parent / "run").exists()
    return line


def change_row(
    rows: Path, number: int, messages: list[dict[str, str]], split: str = "train"
) -> None:
    path = rows / f"{split}.jsonl"
    lines = path.read_text().splitlines()
    lines[number] = json.dumps(json.loads(lines[number]) | {"messages": messages})
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "is the film good"}],
        [{"role": "user", "content": "good"}, {"role": "assistant", "content": " \n"}],
        [{"role": "assistant", "content": ""}],
    ],
)
def test_a_chat_without_an_answer_is_refused_by_its_row(
    messages: list[dict[str, str]], split: str, files: tuple[Path, Path], refused: Refused
) -> None:
    change_row(files[1], 6, messages, split)
    line = refusal(refused, *files)
    assert "row 7 of " in line
    assert "has no answer, a turn of the role 'assistant' with a text" in line
    assert "data.messages-column" in line


def test_a_tokeniser_without_a_template_is_refused(tmp_path: Path, refused: Refused) -> None:
    model = save_model(tmp_path / "model", "llama", template=None)
    line = refusal(refused, model, make_rows(tmp_path / "rows"))
    assert "has no chat template" in line
    assert "chat_template.jinja" in line


def test_an_answer_of_which_the_length_leaves_nothing_is_refused(
    files: tuple[Path, Path], refused: Refused
) -> None:
    long = " ".join(["film"] * 40)
    change_row(
        files[1], 4, [{"role": "user", "content": long}, {"role": "assistant", "content": "good"}]
    )
    line = refusal(refused, *files)
    assert "row 5 of " in line
    assert "nothing of its answer within data.max-length = 32" in line


def test_a_checkpoint_whose_logits_are_nan_in_bfloat16_is_refused(
    files: tuple[Path, Path], refused: Refused
) -> None:
    """Of weights that are numbers, and of one that is none."""
    model, rows = files
    loaded = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        loaded.model.layers[0].mlp.down_proj.weight.mul_(1e38)
        loaded.model.layers[0].mlp.up_proj.weight.mul_(1e38)
    loaded.save_pretrained(model)
    line = refusal(refused, model, rows, backbone_dtype="bfloat16")
    assert "are NaN before any training, in bfloat16: take backbone.dtype = 'float32'" in line
    with torch.no_grad():
        loaded.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    loaded.save_pretrained(model)
    line = refusal(refused, model, rows, backbone_dtype="bfloat16")
    assert "model.layers.0.mlp.up_proj.weight of the checkpoint is not finite" in line


def test_it_does_not_matter_that_the_padding_is_the_token_that_ends_a_turn(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    """As in SmolLM2: the end of an answer is a label all the same, and padding never is."""
    model, rows = files
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    hashes = {}
    for name in ("<|im_end|>", "<|endoftext|>"):
        tokenizer.pad_token = name
        tokenizer.save_pretrained(model)
        experiment = experiment_of(model, rows, tmp_path / f"run{len(hashes)}")
        experiment = replace(experiment, data=replace(experiment.data, metric="loss"))
        result = run(experiment)
        assert result["quality"]["final"] < result["quality"]["before"]
        hashes[name] = result["final_values_sha256"], result["data"]["train_label_tokens"]
    assert hashes["<|im_end|>"] == hashes["<|endoftext|>"]
