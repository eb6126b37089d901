"""Clients that are trained at once come out as if each had been trained alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import architectures
import numpy as np
import pytest
import tiny
import torch
from tiny import Silent

from fedpet.config import TrainingConfig
from fedpet.data import Rows, Task
from fedpet.errors import TrainingError
from fedpet.pet.layers.client_forward import NotStackableError
from fedpet.pet.model import PetModel
from fedpet.training.at_once import ClientWork, TrainedClient, train_at_once
from fedpet.training.loop import TrainResult, train_rows

CLASSES = Task("classification", ("no", "yes"), "accuracy")
NUMBERS = Task("regression", (), "pearson")
SIZES = (9, 3, 14, 1)  # rows of each client: 3, 1, 4 and 1 batches of four


def make(name: str, structure: str, dtype: torch.dtype = torch.float64) -> PetModel:
    base = architectures.backbone(name, dtype)
    mask = architectures.mask_of(base, 0.05)
    return PetModel(base, mask, architectures.structure_of(base, structure), seed=3)


def make_rows(task: Task = CLASSES, *, end: int | None = None) -> Rows:
    generator = np.random.default_rng(0)
    lengths = generator.integers(3, 12, size=sum(SIZES))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = generator.integers(5, 60, size=offsets[-1]).astype(np.int32)
    if end is not None:
        tokens[offsets[1:] - 1] = end
    labels: np.ndarray = generator.integers(0, 2, size=len(lengths))
    if task is NUMBERS:
        labels = generator.normal(size=len(lengths)).astype(np.float32)
    return Rows(tokens, offsets, labels, None, pad_id=0)


def make_clients() -> list[ClientWork]:
    ends = np.cumsum(SIZES)
    return [
        ClientWork(np.arange(end - size, end), seed)
        for seed, (size, end) in enumerate(zip(SIZES, ends, strict=True))
    ]


def start_of(pet: PetModel) -> np.ndarray:
    return np.random.default_rng(1).normal(0, 0.01, pet.num_values).astype(np.float32)


def alone(
    pet: PetModel, start: np.ndarray, client: ClientWork, rows: Rows, task: Task, config: Any
) -> tuple[np.ndarray, TrainResult]:
    pet.set_delta(start, seed=client.seed)
    result = train_rows(
        pet.model,
        pet.parameter_groups(),
        rows,
        client.indices,
        task,
        config,
        seed=client.seed,
        factor=0.75,
        after_step=pet.after_step,
        sent=pet.sent_values(),
    )
    return pet.get_delta().numpy(), result


def check_equal(
    pet: PetModel,
    config: TrainingConfig,
    *,
    task: Task = CLASSES,
    rows: Rows | None = None,
    within: float = 1e-6,
) -> None:
    rows = rows or make_rows(task)
    start, clients = start_of(pet), make_clients()
    together = train_at_once(pet, start, clients, rows, task, config, factor=0.75)
    for client, found in zip(clients, together, strict=True):
        values, result = alone(pet, start, client, rows, task, config)
        assert isinstance(found, TrainedClient)
        assert np.abs(values - start).max() > 50 * within
        np.testing.assert_allclose(found.update, values - start, rtol=0, atol=within)
        assert found.result.loss == pytest.approx(result.loss, rel=max(within, 1e-6))
        assert found.result.num_examples == result.num_examples


SETTINGS = TrainingConfig(
    learning_rate=0.01, learning_rates=("head=0.02",), batch_size=4, local_epochs=2, clip_norm=0.5
)


@pytest.mark.parametrize(
    ("name", "structure"),
    [
        ("bert", "none"),
        ("bert", "lnfit+ln-bias+lora"),
        ("bert", "bitfit+hiwi-bias"),
        ("bert", "hiwi-weight+lora-factors"),
        ("mpnet", "lnfit+lora"),
        ("albert", "bitfit"),
        ("t5", "lnfit+lora"),
        ("gpt2", "lnfit+hiwi-bias+lora"),
        ("llama", "none"),
        ("llama", "lnfit+lora-factors"),
        ("llama", "added-bias+hiwi-weight"),
    ],
)
def test_clients_at_once_end_where_each_ends_alone(name: str, structure: str) -> None:
    check_equal(make(name, structure), SETTINGS, rows=make_rows(end=1 if name == "t5" else None))


def test_an_adapter_on_hidden_states_is_trained_at_once_too() -> None:
    base = architectures.backbone("bert", torch.float64)
    structure = architectures.structure_of(base, "lowrank-adapter")
    check_equal(PetModel(base, None, structure, seed=3), SETTINGS)


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize(("optimizer", "rate"), [("sgd", 0.01), ("adamw", 0.001)])
def test_in_single_precision_they_agree_to_1e_5(name: str, optimizer: str, rate: float) -> None:
    config = replace(SETTINGS, optimizer=optimizer, learning_rate=rate)
    check_equal(make(name, "lnfit+lora", torch.float32), config, within=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "sgd", "clip_norm": 0.0},
        {"weight_decay": 0.1},
        {"schedule": "linear", "logit_adjustment": 1.0},
        {"proximal_mu": 0.5},
        {"cls_only": True},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_settings_mean_at_once_what_they_mean_alone(changes: dict[str, Any]) -> None:
    check_equal(make("bert", "lnfit+lora"), replace(SETTINGS, **changes))


def test_a_regression_is_trained_at_once() -> None:
    check_equal(_one_output(torch.float64), SETTINGS, task=NUMBERS)


def test_a_tier_is_trained_at_once() -> None:
    from fedpet.backbone.module_roles import maskable_weights
    from fedpet.config import MaskConfig
    from fedpet.pet.mask import build_mask

    base = architectures.backbone("bert", torch.float64)
    config = MaskConfig(density=0.05, tiers=("0.01=0.5", "0.05=0.5"))
    mask = build_mask(maskable_weights(base.model, base.head), config)
    pet = PetModel(base, mask, architectures.structure_of(base, "lora"), seed=3)
    pet.set_tier(0)
    check_equal(pet, SETTINGS)


def test_the_model_trains_one_client_as_before_when_it_trained_many() -> None:
    pet, rows = make("bert", "lnfit+hiwi-bias+lora", torch.float32), make_rows()
    start, clients = start_of(pet), make_clients()
    before, _ = alone(pet, start, clients[0], rows, CLASSES, SETTINGS)
    train_at_once(pet, start, clients, rows, CLASSES, SETTINGS)
    after, _ = alone(pet, start, clients[0], rows, CLASSES, SETTINGS)
    assert np.array_equal(before, after)


def test_a_loss_that_is_no_number_stops_its_client_alone() -> None:
    rows, clients = make_rows(NUMBERS), make_clients()
    labels = rows.labels.copy()
    labels[clients[2].indices[5]] = np.nan

    def values(labels: np.ndarray) -> list[TrainedClient | TrainingError]:
        own = replace(rows, labels=labels)
        pet = _one_output()
        return train_at_once(pet, start_of(pet), clients, own, NUMBERS, SETTINGS)

    whole, marred = values(rows.labels), values(labels)
    failed = marred[2]
    assert isinstance(failed, TrainingError)
    assert "the training loss became nan after" in str(failed)
    for index in (0, 1, 3):
        one, other = whole[index], marred[index]
        assert isinstance(one, TrainedClient)
        assert isinstance(other, TrainedClient)
        assert np.array_equal(one.update, other.update)
        assert one.result.loss == other.result.loss


def _one_output(dtype: torch.dtype = torch.float32) -> PetModel:
    from transformers import AutoModelForSequenceClassification

    base = architectures.backbone("bert")
    base.model.config.num_labels = 1
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(base.model.config).eval()
    base = replace(base, model=model.to(dtype).requires_grad_(False))
    mask = architectures.mask_of(base, 0.05)
    return PetModel(base, mask, architectures.structure_of(base, "lora"), seed=3)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("deberta-v2", {}, "not a row a text"),
        ("bert", {"dropout": True}, "dropout"),
        ("bert", {"loss": "some.module:loss"}, "training.loss"),
    ],
)
def test_what_cannot_be_trained_at_once_is_named(
    name: str, changes: dict[str, Any], reason: str
) -> None:
    pet = make(name, "lora", torch.float32)
    with pytest.raises(NotStackableError, match=reason):
        train_at_once(
            pet, start_of(pet), make_clients(), make_rows(), CLASSES, replace(SETTINGS, **changes)
        )


def test_a_model_that_mixes_the_rows_of_a_batch_is_found_by_the_trial() -> None:
    pet = make("bert", "lora", torch.float32)
    plain = pet.model.forward

    def mixing(**inputs: Any) -> Any:
        out = plain(**inputs)
        out.logits = out.logits - out.logits.mean(0)
        return out

    pet.model.forward = mixing
    with pytest.raises(NotStackableError, match="other numbers"):
        train_at_once(pet, start_of(pet), make_clients(), make_rows(), CLASSES, SETTINGS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("at-once")
    return tiny.make_backbone(folder / "backbone"), tiny.make_rows(folder / "rows")


def run(
    folders: tuple[Path, Path], out: Path, refused: Sequence[str] = (), **changes: object
) -> np.ndarray:
    from fedpet.client.node import Node
    from fedpet.client.node_config import NodeConfig
    from fedpet.run.federate import federate, prepare
    from fedpet.run.local_grid import LocalGrid
    from fedpet.run.run_folder import new_run_folder

    settings = tiny.make_experiment(*folders, out, training_optimizer="sgd", **changes)
    grid = LocalGrid({1: Node(NodeConfig.from_experiment(settings)).answer})
    result = federate(grid, prepare(settings, Silent()), new_run_folder(settings), Silent())
    assert result["run"]["status"] == "ok"
    assert [one["reason"] for one in result["refused"]] == [*refused]
    values: np.ndarray = np.load(out / "checkpoint" / "values.npy")
    return values


def test_a_run_with_clients_at_once_is_the_run_with_each_alone(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fedpet.client.train_client as module

    sizes = []
    plain: Callable[..., Any] = module.train_at_once

    def counted(pet: Any, start: Any, clients: Any, *others: Any, **more: Any) -> Any:
        sizes.append(len(clients))
        return plain(pet, start, clients, *others, **more)

    monkeypatch.setattr(module, "train_at_once", counted)
    one_by_one = run(folders, tmp_path / "one")
    assert not sizes
    at_once = run(folders, tmp_path / "many", training_clients_at_once=3)
    assert sizes
    assert set(sizes) <= {2, 3}
    np.testing.assert_allclose(at_once, one_by_one, rtol=0, atol=1e-5)


def test_a_client_that_fails_among_others_is_refused_alone(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fedpet.client.train_client as module

    plain: Callable[..., Any] = module.train_at_once

    def first_fails(*others: Any, **more: Any) -> Any:
        return [TrainingError("the training loss became nan"), *plain(*others, **more)[1:]]

    monkeypatch.setattr(module, "train_at_once", first_fails)
    more: dict[str, object] = {"training_clients_at_once": 4, "strategy_num_rounds": 1}
    run(folders, tmp_path / "many", refused=["the training loss became nan"], **more)


def test_clients_that_cannot_be_trained_at_once_are_trained_alone_and_that_is_told(
    folders: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import fedpet.client.train_client as module

    module._tell.cache_clear()
    one_by_one = run(folders, tmp_path / "one", training_dropout=True)
    with caplog.at_level(logging.WARNING, logger="fedpet"):
        at_once = run(folders, tmp_path / "many", training_dropout=True, training_clients_at_once=3)
    assert np.array_equal(at_once, one_by_one)
    told = [line for line in caplog.messages if "trained one by one" in line]
    assert len(told) == 1
    assert "dropout" in told[0]
