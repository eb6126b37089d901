"""A PetModel in the hands of loops that know nothing of it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, backbone, batch, loss_of
from torch import Tensor, nn

from fedpet import (
    AdapterConfig,
    BitFitConfig,
    HiwiConfig,
    LayerNormConfig,
    LoraConfig,
    PetConfig,
)
from fedpet.config import MaskConfig, TrainingConfig
from fedpet.data import Rows, Task
from fedpet.pet.factory import get_pet_model
from fedpet.pet.model import PetModel
from fedpet.training.batching import batches
from fedpet.training.loop import train_rows
from fedpet.utils.seeds import derive_seed

TASK = Task("classification", ("bad", "good"), "accuracy")
TRAINING = TrainingConfig(
    learning_rate=0.01, local_epochs=2, batch_size=4, clip_norm=1.0, padding_free=False
)
SEED = 5
PARTS = {
    "mask": PetConfig(mask=MaskConfig(density=0.05)),
    "lora": PetConfig(modules=[LoraConfig(r=2)]),
    "layer norms": PetConfig(modules=[LayerNormConfig()]),
    "hiwi on biases": PetConfig(modules=[HiwiConfig(r=2)]),
    "lora, both factors": PetConfig(modules=[LoraConfig(r=2, freeze_a=False)]),
    "adapters": PetConfig(modules=[AdapterConfig(r=2)]),
    "a module in full": PetConfig(modules_to_save=["0.output.dense", "classifier"]),
    "all": PetConfig(
        mask=MaskConfig(density=0.05),
        modules=[
            LoraConfig(r=2),
            LayerNormConfig(),
            HiwiConfig(r=2),
            HiwiConfig(r=2, on="weight"),
            BitFitConfig(),
        ],
    ),
}


def _base(name: str = "bert") -> Any:
    """Without dropout: Trainer trains in training mode, our loop does not unless it is told to."""
    model = backbone(name).model
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def _pet(config: PetConfig = PARTS["all"], name: str = "bert") -> PetModel:
    return get_pet_model(_base(name), config)


def _rows() -> Rows:
    generator = np.random.default_rng(3)
    lengths = generator.integers(4, 12, 30)
    return Rows(
        tokens=generator.integers(5, 60, int(lengths.sum())).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        labels=generator.integers(0, 2, 30),
        types=None,
        pad_id=0,
    )


def _batches(rows: Rows) -> list[dict[str, Tensor]]:
    """Return the batches that `train_rows` visits, in its order."""
    generator = np.random.default_rng(derive_seed("batches", SEED))
    indices = np.arange(len(rows.labels))
    return [
        dict(rows.batch(chosen))
        for _ in range(TRAINING.local_epochs)
        for chosen in batches(indices, rows.lengths, TRAINING.batch_size, generator)
    ]


def _ours(pet: PetModel, rows: Rows) -> Tensor:
    train_rows(
        pet.model, pet.parameter_groups(), rows, np.arange(len(rows.labels)), TASK, TRAINING,
        seed=SEED, after_step=pet.after_step,
    )  # fmt: skip
    return pet.get_delta()


def _textbook(pet: PetModel, some: Iterable[dict[str, Tensor]], *, cleared_late: bool) -> Tensor:
    trained = [p for p in pet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.0, fused=True)
    for inputs in some:
        if not cleared_late:
            optimizer.zero_grad()
        loss = pet(**inputs).loss
        if cleared_late:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(pet.parameters(), 1.0)
        optimizer.step()
    return pet.get_delta()


@pytest.mark.parametrize("cleared_late", [False, True], ids=["before", "after the pass"])
@pytest.mark.parametrize("part", PARTS)
def test_a_textbook_loop_gives_our_loops_values_to_the_bit(part: str, cleared_late: bool) -> None:
    rows = _rows()
    ours = _ours(_pet(PARTS[part]), rows)
    theirs = _textbook(_pet(PARTS[part]), _batches(rows), cleared_late=cleared_late)
    assert torch.equal(ours, theirs)
    assert ours.abs().max() > 1e-3


@pytest.mark.parametrize("part", PARTS)
def test_trainer_gives_our_loops_values_to_the_bit(part: str, tmp_path: Path) -> None:
    rows = _rows()
    ours = _ours(_pet(PARTS[part]), rows)
    pet = _pet(PARTS[part])
    trainer = _trainer(pet, _batches(rows), tmp_path)
    trainer.train()
    assert torch.equal(ours, pet.get_delta())
    # It went through the model as Trainer sees it: the loss of these rows fell.
    assert trainer.state.log_history[-1]["train_loss"] > 0


def _trainer(pet: PetModel, some: list[dict[str, Tensor]], folder: Path, **more: Any) -> Any:
    pytest.importorskip("accelerate")
    from torch.utils.data import DataLoader
    from transformers import Trainer, TrainingArguments

    class InOurOrder(Trainer):
        def get_train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(some, batch_size=1, shuffle=False, collate_fn=lambda one: one[0])

    arguments: dict[str, Any] = {
        "output_dir": str(folder), "num_train_epochs": 1, "learning_rate": 0.01,
        "lr_scheduler_type": "constant", "weight_decay": 0.0, "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused", "report_to": "none", "use_cpu": True, "save_strategy": "no",
        "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    return InOurOrder(pet, TrainingArguments(**arguments | more), train_dataset=some)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=1e-3, fused=True),
        lambda p: torch.optim.SGD(p, lr=2e-4, momentum=0.9, foreach=True),
        lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
        lambda p: torch.optim.Adagrad(p, lr=0.01),
        lambda p: torch.optim.RMSprop(p, lr=0.001),
        lambda p: torch.optim.Adafactor(p, lr=0.05),
        lambda p: _BehindTheBack(p, {"lr": 1e-3}),
    ],
    ids=["sgd-fused", "momentum", "adamw-fused", "adagrad", "rmsprop", "adafactor", "data"],
)
def test_whatever_optimiser_steps_the_model_computes_with_the_step(
    optimizer: Callable[[Any], torch.optim.Optimizer],
) -> None:
    pet, inputs = _pet(), batch("bert", rows=4)
    stepping = optimizer(list(pet.parameters()))
    losses = []
    for _ in range(4):
        loss = loss_of(pet, inputs)
        stepping.zero_grad()
        loss.backward()
        stepping.step()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        after = pet(**inputs).logits
        assert torch.equal(pet.model(**inputs).logits, after)
        plain = pet.merged()(**inputs).logits
    assert losses[-1] < losses[0]
    torch.testing.assert_close(plain, after, rtol=1e-5, atol=1e-5)


class _BehindTheBack(torch.optim.Optimizer):
    """Moves `.data`, of which torch counts no change, as optimisers outside torch do."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.add_(parameter.grad, alpha=-group["lr"])


def test_gradients_add_up_over_passes_until_they_are_cleared() -> None:
    pet, twin = _pet(), _pet()
    one, two = batch("bert", seed=1), batch("bert", seed=2)
    loss_of(pet, one).backward()
    loss_of(pet, two).backward()
    (loss_of(twin, one) + loss_of(twin, two)).backward()
    for mine, other in zip(pet.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6)
    for clear in (pet.zero_grad, pet.model.zero_grad, twin.zero_grad):
        clear()
    assert not any(parameter.grad.any() for parameter in [*pet.parameters(), *twin.parameters()])


def test_clearing_the_gradients_of_the_model_inside_takes_none_away() -> None:
    pet = _pet(PARTS["layer norms"])
    pet.model.zero_grad()
    loss_of(pet, batch("bert")).backward()
    assert all(parameter.grad.any() for parameter in pet.parameters())


def test_two_passes_may_share_one_backward_though_gradients_are_cleared_between_them() -> None:
    pet = _pet()
    optimizer = torch.optim.AdamW(pet.parameters(), lr=0.01)
    for _ in range(2):
        first = loss_of(pet, batch("bert", seed=1))
        optimizer.zero_grad()
        (first + loss_of(pet, batch("bert", seed=2))).backward()
        optimizer.step()
    assert pet.get_delta().abs().max() > 1e-3


def test_a_gradient_that_is_assigned_is_the_one_the_optimiser_sees_and_the_next_adds_to() -> None:
    pet, inputs = _pet(), batch("bert")
    loss_of(pet, inputs).backward()
    before = [parameter.grad.clone() for parameter in pet.parameters()]
    for parameter in pet.parameters():
        parameter.grad = parameter.grad * 2
    loss_of(pet, inputs).backward()
    for parameter, one in zip(pet.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.grad, 3 * one, rtol=1e-5, atol=1e-6)


def test_our_loop_pays_no_comparison_for_the_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    pet, rows = _pet(), _rows()
    written = []
    plain = pet._storage.write
    monkeypatch.setattr(pet._storage, "write", lambda: written.append(plain()))
    monkeypatch.setattr(pet._storage, "refresh", lambda: pytest.fail("a pass compared"))
    _ours(pet, rows)
    assert len(written) == len(_batches(rows))


def test_an_outer_module_may_hold_a_pet_model_and_its_parameters() -> None:
    """An outer module lists the biases and gains of the model inside as well."""
    pet, twin, inputs = _pet(PARTS["layer norms"]), _pet(PARTS["layer norms"]), batch("bert")
    outer = nn.ModuleDict({"pet": pet})
    for parameters in (list(outer.parameters()), list(twin.parameters())):
        optimizer = torch.optim.AdamW(parameters, lr=0.01)
        model = pet if len(parameters) > len(list(twin.parameters())) else twin
        for _ in range(3):
            loss = loss_of(model, inputs)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert torch.equal(pet.get_delta(), twin.get_delta())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_trains_by_a_plain_loop_and_merges(name: str) -> None:
    modules = [LoraConfig(r=2), LayerNormConfig(), AdapterConfig(r=2)]
    pet, inputs = _pet(PetConfig(mask=MaskConfig(density=0.02), modules=modules), name), batch(name)
    optimizer = torch.optim.AdamW(pet.parameters(), lr=0.01)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = loss_of(pet, inputs)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    with torch.no_grad():
        adapted = pet(**inputs).logits
        plain = pet.merge_and_unload()
        torch.testing.assert_close(plain(**inputs).logits, adapted, rtol=1e-5, atol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    inputs, gradients = batch("bert"), []
    for checkpointed in (False, True):
        pet = _pet().train()
        if checkpointed:
            pet.activation_checkpointing_enable()
        loss_of(pet, inputs).backward()
        gradients.append([parameter.grad.clone() for parameter in pet.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_trainer_evaluates_predicts_and_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    some = _batches(_rows())
    straight = _pet()
    _trainer(straight, some, tmp_path / "a").train()
    more = {"save_strategy": "steps", "save_steps": 8, "save_total_limit": 1}
    cut = _trainer(_pet(), some[:8], tmp_path / "b", **more)
    cut.train()
    [checkpoint] = (tmp_path / "b").glob("checkpoint-*")
    pet = get_pet_model(_other_head(_base()), PARTS["all"])
    resumed = _trainer(pet, some, tmp_path / "b")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    torch.testing.assert_close(pet.get_delta(), straight.get_delta(), rtol=0, atol=0)
    rows = [{k: v[0] for k, v in one.items()} for one in some[:4]]
    scores = resumed.evaluate([row for row in rows if len(row["input_ids"]) == 11] or rows[:1])
    assert scores["eval_loss"] > 0


def _other_head(model: Any) -> Any:
    """As loading the checkpoint again would draw it."""
    with torch.no_grad():
        model.classifier.weight.add_(1.0)
    return model


def _through_torch_save(pet: PetModel) -> PetModel:
    file = io.BytesIO()
    torch.save(pet, file)
    file.seek(0)
    loaded: PetModel = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, _through_torch_save, lambda pet: pickle.loads(pickle.dumps(pet))],
    ids=["deepcopy", "torch.save", "pickle"],
)
def test_a_copy_goes_its_own_way(copied: Callable[[PetModel], PetModel]) -> None:
    pet, inputs = _pet(), batch("bert")
    _textbook(pet, _batches(_rows())[:3], cleared_late=False)
    pet.model.eval()  # as our loop does
    twin = copied(pet)
    assert not any(module.training for module in twin.modules() if module is not twin.trainable)
    here = pet.get_delta()
    assert torch.equal(twin.get_delta(), here)
    assert torch.equal(twin(**inputs).logits, pet(**inputs).logits)
    for one in (pet, twin):
        _textbook(one, _batches(_rows())[3:6], cleared_late=False)
        if one is pet:
            assert torch.equal(twin.get_delta(), here)
    assert torch.equal(twin.get_delta(), pet.get_delta())
    assert not torch.equal(twin.get_delta(), here)
