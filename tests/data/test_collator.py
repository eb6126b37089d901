"""A data collator of one's own: it makes the batches of training and of evaluation alike."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import foreign_functions
import numpy as np
import pytest
import tiny
import torch
from own_names import built_in_names
from torch import Tensor
from transformers import AutoTokenizer, DataCollatorWithPadding

import fedpet
from fedpet.config import Experiment
from fedpet.data.collator import COLLATORS, register_data_collator
from fedpet.data.rows import Rows
from fedpet.errors import ConfigError
from fedpet.protocol.plan import Plan

CUT = "foreign_functions:four_tokens"
ROWS = Rows(
    tokens=np.array([2, 5, 6, 3, 2, 7, 8, 9, 6, 3], dtype=np.int32),
    offsets=np.array([0, 4, 10]),
    labels=np.array([1, 0]),
    types=np.zeros(10, dtype=np.uint8),
    pad_id=0,
)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    folder = tmp_path_factory.mktemp("collator")
    files = tiny.make_backbone(folder / "b"), tiny.make_rows(folder / "r")
    return tiny.make_experiment(*files, folder / "unused", strategy_num_rounds=1)


@pytest.fixture(autouse=True)
def _own_names() -> Iterator[None]:
    with built_in_names():
        COLLATORS.add("four_tokens", foreign_functions.four_tokens)
        yield


def run(experiment: Experiment, out: Path, **settings: Any) -> fedpet.Run:
    return fedpet.simulate(experiment, out=out, backend="in-process", progress=False, **settings)


def test_transformers_padding_collator_gives_the_run_that_has_none(
    experiment: Experiment, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(experiment.backbone.model)
    calls = []

    @register_data_collator("padded")
    def padded(features: list[dict[str, Any]]) -> Any:
        calls.append(len(features))
        return DataCollatorWithPadding(tokenizer)(features)

    plain = run(experiment, tmp_path / "plain")
    mine = run(experiment, tmp_path / "mine", data_collator=padded)
    assert mine.result["final_values_sha256"] == plain.result["final_values_sha256"]
    assert mine.metrics == plain.metrics
    assert max(calls[-2:]) > experiment.training.batch_size  # of the evaluation


def test_a_collator_that_cuts_rows_changes_training_and_evaluation(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths: list[list[int]] = []
    cut = COLLATORS.find("four_tokens")

    def watched(features: list[dict[str, Any]]) -> Any:
        batch = cut(features)
        widths.append(list(batch["input_ids"].shape))
        return batch

    plain = run(experiment, tmp_path / "plain")
    named = run(experiment, tmp_path / "named", data_collator="four_tokens")
    by_path = run(experiment, tmp_path / "path", data={"collator": CUT})
    monkeypatch.setattr(foreign_functions, "four_tokens", register_data_collator("seen")(watched))
    seen = run(experiment, tmp_path / "seen", data_collator="foreign_functions:four_tokens")
    shas = [each.result["final_values_sha256"] for each in (plain, named, by_path, seen)]
    assert shas[0] != shas[1] == shas[2] == shas[3]
    assert {width for _, width in widths} == {4}
    assert {rows for rows, _ in widths} >= {4, 40}  # a training batch, the evaluation's


def test_a_plan_names_a_collator_by_its_path_and_is_as_it_was_without_one(
    experiment: Experiment, tmp_path: Path
) -> None:
    plans = {
        name: Plan.from_bytes(run(experiment, tmp_path / f"run-{number}", data_collator=name)
                              .folder.joinpath("plan.bin").read_bytes())
        for number, name in enumerate(("", "four_tokens"))
    }  # fmt: skip
    assert [plan.collator for plan in plans.values()] == ["", CUT]
    assert "collator" not in json.loads(plans[""]._header())


def test_a_row_is_what_trainer_gives_its_collators() -> None:
    seen: list[dict[str, Any]] = []

    def collator(features: list[dict[str, Any]]) -> dict[str, Tensor]:
        seen.extend(features)
        return {"labels": torch.tensor([row["labels"] for row in features])}

    rows = Rows(**{**vars(ROWS), "collator": collator})
    assert rows.batch(np.array([1, 0]))["labels"].tolist() == [0, 1]
    assert seen[1] == {
        "input_ids": [2, 5, 6, 3],
        "attention_mask": [1, 1, 1, 1],
        "token_type_ids": [0, 0, 0, 0],
        "labels": 1,
    }
    assert rows.take(np.array([0])).collator is collator


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (None, "failed on 2 rows with TypeError"),
        ({"input_ids": torch.ones(2, 3)}, '"labels" of the 2 rows among them'),
        ({"labels": torch.ones(3)}, "with 3 labels"),
        ({"labels": [1, 0]}, "'labels': 'list'"),
        ({"labels": torch.ones(2), "input_ids": [[2], [3]]}, "'input_ids': 'list'"),
    ],
)
def test_what_is_no_batch_of_the_rows_is_refused(returned: Any, words: str) -> None:
    rows = Rows(**{**vars(ROWS), "collator": lambda _: returned})
    with pytest.raises(ConfigError, match=words):
        rows.batch(np.arange(2))


@pytest.mark.parametrize(
    ("collator", "words"),
    [
        (lambda features: {}, r"is no data collator with a name: put @fedpet\.register_data_coll"),
        ("absent", "no data collator 'absent' is registered"),
        ("foreign_functions:not_registered", "is no data collator: put @"),
        ("no_such_package:pad", "cannot be imported here"),
    ],
)
def test_a_collator_that_is_none_is_refused_before_any_client_trains(
    experiment: Experiment, tmp_path: Path, collator: Any, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        run(experiment, tmp_path / "run", data_collator=collator)


def test_an_object_of_a_class_is_known_by_its_name_alone(experiment: Experiment) -> None:
    tokenizer = AutoTokenizer.from_pretrained(experiment.backbone.model)
    collator = register_data_collator("object")(DataCollatorWithPadding(tokenizer))
    assert COLLATORS.name_of(collator) == COLLATORS.portable("object") == "object"
