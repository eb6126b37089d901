"""data.max-length against what a backbone has positions for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from shipped import KINDS, load, ship
from tiny import Silent

from fedpet.config import Experiment
from fedpet.errors import ConfigError
from fedpet.run.federate import prepare
from fedpet.training.input_checks import max_tokens

LEARNED = ["bert", "roberta", "distilbert", "mpnet", "albert", "electra", "deberta", "bart"]


def _shortened(name: str, folder: Path, positions: int) -> Path:
    key = "n_positions" if name == "gpt2" else "max_position_embeddings"
    return ship(name, folder, **{key: positions})


def _called(model: Any, tokens: int) -> None:
    ids = torch.full((1, tokens), 7)
    ids[0, -1] = getattr(model.config, "eos_token_id", None) or 7
    model(input_ids=ids, attention_mask=torch.ones_like(ids))


@pytest.mark.parametrize("name", [*LEARNED, "gpt2"])
def test_the_longest_text_is_the_longest_that_the_model_can_be_called_with(
    tmp_path: Path, name: str
) -> None:
    model = load(_shortened(name, tmp_path / "made", 16))
    limit = max_tokens(model)
    assert limit == {"roberta": 14, "mpnet": 14}.get(name, 16)
    _called(model, limit)
    with pytest.raises((IndexError, RuntimeError)):
        _called(model, limit + 1)


@pytest.mark.parametrize("name", ["llama", "mistral", "modernbert", "t5", "xlnet"])
def test_positions_that_are_computed_set_no_limit(tmp_path: Path, name: str) -> None:
    sized = {} if name in ("t5", "xlnet") else {"max_position_embeddings": 16}
    model = load(ship(name, tmp_path / "made", **sized))
    assert max_tokens(model) is None
    _called(model, 20)


def test_every_kind_is_in_one_list_or_the_other() -> None:
    computed = {"llama", "mistral", "qwen2", "modernbert", "t5", "xlnet"}
    assert {*KINDS} - computed == {*LEARNED, "deberta-v2", "gpt2"}


@pytest.mark.parametrize(("name", "limit"), [("bert", 16), ("roberta", 14), ("gpt2", 16)])
def test_a_max_length_above_the_positions_is_refused_before_the_run(
    tmp_path: Path, name: str, limit: int
) -> None:
    (tmp_path / "rows").mkdir()
    for split in ("train", "test"):
        lines = [
            json.dumps({"text": "good film " * (index + 1), "label": index % 2, "client": "c"})
            for index in range(12)
        ]
        (tmp_path / "rows" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    backbone = _shortened(name, tmp_path / "made", 16)

    def prepared(max_length: int) -> None:
        tables = {
            "run": {"cache": str(tmp_path / "cache")},
            "backbone": {"model": str(backbone)},
            "data": {"source": str(tmp_path / "rows"), "max-length": max_length},
            "clients": {"client-column": "client"},
            "structure": {"preset": "lnfit"},
        }
        prepare(Experiment.from_tables(tables), Silent())

    prepared(limit)
    with pytest.raises(ConfigError, match=rf"^data.max-length is 32 .* at most {limit}: lower it"):
        prepared(32)
