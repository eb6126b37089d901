"""Products by oneDNN are torch's up to rounding, in every layer that is not trained whole."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, backbone, batch, loss_of, mask_of, structure_of
from hypothesis import given
from hypothesis import strategies as st
from tiny import Silent
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fedpet.client.node import Node
from fedpet.client.node_config import NodeConfig
from fedpet.config import TrainingConfig
from fedpet.errors import ConfigError
from fedpet.pet.kernels.matmul import (
    CACHE_VARIABLE,
    CACHED_SHAPES,
    PRODUCTS,
    ROWS,
    onednn_matmul,
    torch_matmul,
)
from fedpet.pet.model import PetModel
from fedpet.pet.modules.base import is_dense
from fedpet.run.prepare import prepare

with_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch carries no oneDNN"
)


class Calls(TorchDispatchMode):
    """Counts the operations that run within it."""

    def __enter__(self) -> Calls:
        self.onednn = 0
        self.shapes: set[tuple[Any, ...]] = set()
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.mkldnn._linear_pointwise.default:
            self.onednn += 1
            self.shapes.add((args[0].shape, args[1].shape))
        return func(*args, **(kwargs or {}))


def _pet(name: str, structure: str, products: str, *, masked: bool = True) -> PetModel:
    base = backbone(name)
    mask = mask_of(base) if masked else None
    return PetModel(base, mask, structure_of(base, structure), seed=3, products=products)


def _results(pet: PetModel, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits without and with gradients, and the gradients."""
    values = torch.randn(pet.num_values, generator=torch.Generator().manual_seed(1))
    pet.set_delta(0.1 * values, seed=5)
    with torch.inference_mode():
        plain = pet.model(**inputs).logits
    pet.zero_grad()
    trained = pet.model(**inputs).logits
    loss_of(pet.model, inputs).backward()
    groups = pet.parameter_groups().values()
    return plain, trained, torch.cat([group.grad.flatten() for group in groups])


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("structure", ["none", "lora-factors+lnfit", "hiwi-weight+lowrank-adapter"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_and_gradients_are_those_of_torch(name: str, structure: str, masked: bool) -> None:
    inputs = batch(name, rows=4)
    expected = _results(_pet(name, structure, "torch", masked=masked), inputs)
    found = _results(_pet(name, structure, "onednn", masked=masked), inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    if expected[2].numel():
        assert expected[2].abs().max() > 1e-4


@with_onednn
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_layer_that_is_not_a_head_is_multiplied_by_onednn(name: str, masked: bool) -> None:
    pet, inputs = _pet(name, "none", "onednn", masked=masked), batch(name, rows=4)
    called = 0

    def count(module: Any, args: Any, output: Any) -> None:
        nonlocal called
        called += not module.weight.requires_grad

    dense = [module for module in pet.model.modules() if is_dense(module)]
    handles = [module.register_forward_hook(count) for module in dense]
    with Calls() as calls, torch.no_grad():
        pet.model(**inputs)
    for handle in handles:
        handle.remove()
    assert calls.onednn == called > 4


@with_onednn
def test_torch_multiplies_where_nothing_is_said() -> None:
    base = backbone("bert")
    pet = PetModel(base, mask_of(base), structure_of(base, "lora+lnfit"), seed=3)
    with Calls() as calls:
        loss_of(pet.model, batch("bert")).backward()
    assert calls.onednn == 0


def test_the_plain_model_and_the_checkpoint_multiply_as_ever() -> None:
    pet, inputs = _pet("bert", "lora+lnfit", "onednn"), batch("bert")
    merged = pet.merged()
    pet.unload()
    for model in (merged, pet.model):
        with Calls() as calls, torch.no_grad():
            model(**inputs)
        assert calls.onednn == 0
        assert not any("forward" in module.__dict__ for module in model.modules())


@given(
    sizes=st.tuples(st.integers(0, 40), st.integers(1, 40), st.integers(1, 40)),
    turned=st.tuples(st.booleans(), st.booleans()),
    bias=st.sampled_from(["none", "a column", "a row"]),
    seed=st.integers(0, 9),
)
def test_a_product_is_the_same_whatever_its_sizes_and_strides(
    sizes: tuple[int, int, int], turned: tuple[bool, bool], bias: str, seed: int
) -> None:
    m, k, n = sizes
    draw = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, across: bool) -> Tensor:
        if across:
            return torch.randn(columns, rows, generator=draw).t()
        return torch.randn(rows, columns, generator=draw)

    left, right = matrix(m, k, turned[0]), matrix(n, k, turned[1])
    added = {"none": None, "a column": matrix(n, 1, False)[:, 0], "a row": matrix(m, 1, False)}
    expected = torch_matmul(left.double(), right.double(), _double(added[bias]))
    for product in PRODUCTS.values():
        before = left.clone(), right.clone()
        found = product(left, right, added[bias])
        assert found.is_contiguous()
        torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
        assert torch.equal(left, before[0])
        assert torch.equal(right, before[1])


def _double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double()


def test_what_onednn_cannot_do_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right, bias = torch.randn(5, 7), torch.randn(3, 7), torch.randn(3)
    wide = [tensor.double() for tensor in (left, right, bias)]
    assert torch.equal(onednn_matmul(*wide), torch_matmul(*wide))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert onednn_matmul(left, right, bias).dtype == torch.bfloat16
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with Calls() as calls:
        assert torch.equal(onednn_matmul(left, right, bias), torch_matmul(left, right, bias))
    assert calls.onednn == 0


def test_other_products_are_refused_in_a_sentence() -> None:
    words = r"training\.matmul-backend must be one of torch, onednn, auto, got"
    with pytest.raises(ConfigError, match=words):
        TrainingConfig(matmul_backend="blas")


@with_onednn
@pytest.mark.parametrize("transposed", [False, True])
def test_oneDNN_compiles_for_few_numbers_of_tokens_and_results_have_as_many(
    transposed: bool,
) -> None:
    weight, bias = torch.randn(24, 40), torch.randn(24)
    with Calls() as calls:
        for tokens in range(1, 20 * ROWS + 1):
            x = torch.randn(40, tokens).t() if transposed else torch.randn(tokens, 40)
            y = onednn_matmul(x, weight, bias)
            assert y.shape == (tokens, 24)
            assert y.is_contiguous()
            torch.testing.assert_close(y, torch_matmul(x, weight, bias), rtol=1e-3, atol=1e-4)
    assert calls.onednn == 20 * ROWS
    # each number below ROWS, one for each ROWS above; laid out in both ways where transposed
    assert len(calls.shapes) <= ROWS + 20


def test_a_run_and_a_node_bound_what_onednn_keeps_and_leave_a_users_own_bound(
    experiment: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = experiment()
    for start in (
        lambda: prepare(settings, Silent()),
        lambda: Node(NodeConfig.from_experiment(settings)),
    ):
        monkeypatch.delenv(CACHE_VARIABLE, raising=False)
        start()
        assert os.environ[CACHE_VARIABLE] == str(CACHED_SHAPES)
        monkeypatch.setenv(CACHE_VARIABLE, "500")
        start()
        assert os.environ[CACHE_VARIABLE] == "500"
