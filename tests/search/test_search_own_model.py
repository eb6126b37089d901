"""A search on a model and rows of one's own, by one call."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from architectures import backbone
from datasets import Dataset

import fedpet
from fedpet.errors import BackboneError, ConfigError, DataError, StructureError
from fedpet.search.from_dataset import rows_from_dataset, task_of_model

CONFIG = fedpet.SearchConfig(budget=300, max_steps=4, batch_size=8, evaluate_every=2)


def rows(count: int = 40) -> list[dict[str, Any]]:
    return [
        {
            "input_ids": [2, 5 + number % 9, 6 + number % 7, 3][: 3 + number % 2],
            "labels": number % 2,
        }
        for number in range(count)
    ]


@pytest.mark.parametrize("name", ["bert", "albert", "llama"])
def test_a_found_structure_keeps_its_budget_and_the_model_is_as_it_was(name: str) -> None:
    model = backbone(name).model
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    found = fedpet.search_structure(model, rows(), CONFIG)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert 0 < found.provenance["values"] <= 300
    assert len(found.gates) == len(found.modules)
    pet = fedpet.get_pet_model(model, fedpet.PetConfig(modules=found))
    assert sum(s.size for s in pet.segments if s.kind != "head") == found.provenance["values"]


def test_a_dataset_a_list_and_padded_rows_find_the_same_structure() -> None:
    padded = [
        {
            "input_ids": row["input_ids"] + [0] * (6 - len(row["input_ids"])),
            "attention_mask": [1] * len(row["input_ids"]) + [0] * (6 - len(row["input_ids"])),
            "label": torch.tensor(row["labels"]),
        }
        for row in rows()
    ]
    found = [
        fedpet.search_structure(backbone("bert").model, dataset, CONFIG)
        for dataset in (rows(), padded, Dataset.from_list(rows()))
    ]
    assert found[0] == found[1] == found[2]


def test_a_structure_travels_by_file_to_another_model_of_the_same_backbone() -> None:
    found = fedpet.search_structure(
        backbone("bert").model, rows(), CONFIG, mask=fedpet.MaskConfig(density=0.01)
    )
    again = fedpet.Structure.from_json(found.to_json())
    assert again.modules == found.modules
    assert len(found.fingerprint) == 64
    pet = fedpet.get_pet_model(backbone("bert").model, fedpet.PetConfig(modules=again))
    assert pet.fingerprint() == found.fingerprint


def test_a_search_trains_on_a_loss_of_ones_own() -> None:
    import foreign_functions  # registers it

    training = fedpet.TrainingConfig(loss="foreign_functions:focal")
    plain, own = (
        fedpet.search_structure(backbone("bert").model, rows(), CONFIG, training=chosen)
        for chosen in (None, training)
    )
    assert plain.gates != own.gates
    assert foreign_functions.focal is not None
    assert "loss foreign_functions:focal" in own.provenance["deviations"]


def test_a_regression_is_searched_by_squared_error() -> None:
    base = backbone("bert")
    base.model.config.problem_type = "regression"
    assert task_of_model(base.model).metric == "pearson"
    values = rows_from_dataset([{**row, "labels": 0.5} for row in rows(3)], base.model)
    assert values.labels.dtype == np.float32


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ([], "needs rows"),
        ([{"text": "a b", "labels": 1}], r"row 1 must be a mapping .*KeyError: 'input_ids'"),
        ([{"input_ids": [1, 2]}], "row 1 must be a mapping"),
        ([{"input_ids": [1, 2], "labels": [0, 1]}], "row 1 must be a mapping"),
        (["a b"], "row 1 must be a mapping"),
        (rows(2), "splits its rows in three, and got 2"),
    ],
)
def test_rows_of_another_form_are_refused_with_their_number(dataset: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        fedpet.search_structure(backbone("bert").model, dataset, CONFIG)


def test_what_cannot_be_searched_is_refused_and_leaves_the_model_plain() -> None:
    model = backbone("bert").model
    with pytest.raises(StructureError, match="the budget must be below"):
        fedpet.search_structure(model, rows(), fedpet.SearchConfig(budget=10**6))
    training = fedpet.TrainingConfig(loss="absent")
    with pytest.raises(ConfigError, match="no loss 'absent'"):
        fedpet.search_structure(model, rows(), CONFIG, training=training)
    pet = fedpet.get_pet_model(model, fedpet.PetConfig(modules=[fedpet.LayerNormConfig()]))
    with pytest.raises(BackboneError, match="already"):
        fedpet.search_structure(pet, rows(), CONFIG)
    with pytest.raises(BackboneError, match="already"):
        fedpet.search_structure(model, rows(), CONFIG)
