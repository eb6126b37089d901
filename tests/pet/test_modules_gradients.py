"""Gradients of the PET modules, in float64 against differences, and those of a mask against a
dense layer's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from architectures import (
    ARCHITECTURES,
    backbone,
    batch,
    biases_of_norms,
    loss_of,
    mask_of,
    structure_of,
)
from torch import Tensor, nn

import fedpet.pet.layers.sparse_grad_linear as dense_module
from fedpet.pet.layers.sparse_grad_linear import LinearSpec, dense
from fedpet.pet.model import PetModel
from fedpet.pet.modules import MaskedWeight, MaskedWeights
from fedpet.pet.structure import PRESETS, Structure


def _masked(
    weight: Tensor, positions: Tensor, transposed: bool = False
) -> tuple[MaskedWeights, nn.Parameter]:
    masked = MaskedWeights([MaskedWeight("w", weight, positions, transposed)])
    v = nn.Parameter(torch.zeros(len(positions), dtype=weight.dtype))
    masked.bind([v])
    return masked, v


def _case(
    transposed: bool, density: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input (2, 5, 7), weight of 7 -> 6, bias, positions by rank."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 7, dtype=dtype)
    weight = torch.randn((7, 6) if transposed else (6, 7), dtype=dtype)
    count = max(1, int(density * weight.numel()))
    return x, weight, torch.randn(6, dtype=dtype), torch.randperm(weight.numel())[:count]


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_masked_layer_passes_gradcheck(transposed: bool, density: float, columns: bool) -> None:
    x, weight, bias, positions = _case(transposed, density, torch.float64)
    masked, v = _masked(weight, positions, transposed)
    plan = LinearSpec(transposed, masked.weights[0], (), columns)

    def layer(x: Tensor, bias: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            masked.trainables[0].copy_(v)
            masked.write_weights()
        return dense(x, weight.clone(), bias, plan, [v])

    inputs = (
        x.requires_grad_(),
        bias.requires_grad_(),
        torch.randn_like(v).requires_grad_(),
    )
    assert torch.autograd.gradcheck(layer, inputs, check_undefined_grad=False)


@pytest.mark.parametrize("kind", ["mask", "bias of norms", *PRESETS])
def test_every_module_passes_a_check_by_differences_in_float64(kind: str) -> None:
    name = {"added-bias": "llama", "bias of norms": "t5"}.get(kind, "bert")
    base = backbone(name, torch.float64)
    mask = mask_of(base, 0.02) if kind == "mask" else None
    if kind in PRESETS:
        structure = structure_of(base, kind)
    else:
        structure = biases_of_norms(base) if "norms" in kind else Structure()
    pet = PetModel(base, mask, structure, seed=3)
    pet.set_delta(0.3 * torch.randn(pet.num_values), seed=1)
    inputs = batch(name, rows=2, tokens=5)
    _check(pet, kind, lambda: loss_of(pet.model, inputs))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_through_every_architecture_pass_the_check(name: str) -> None:
    base = backbone(name, torch.float64)
    pet = PetModel(base, mask_of(base, 0.02), structure_of(base, "lnfit+lora"), seed=3)
    pet.set_delta(0.1 * torch.randn(pet.num_values), seed=1)
    inputs = batch(name, rows=2, tokens=5)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].double()
    for kind in ("mask", "lnfit", "lora", "head"):
        _check(pet, kind, lambda: loss_of(pet.model, inputs), directions=2)


def _check(
    pet: PetModel,
    kind: str,
    loss: Callable[[], Tensor],
    *,
    directions: int = 6,
    eps: float = 1e-6,
) -> None:
    """Compare the gradient of one kind's trainables with differences along random directions."""
    name = kind if kind in pet.parameter_groups() else "bitfit"
    group = pet.parameter_groups()[name]
    with torch.no_grad():
        group.add_(0.05 * torch.randn_like(group))  # off the start, where factors are zero
    pet.after_step()
    pet.zero_grad()
    loss().backward()
    assert group.grad is not None
    gradient = group.grad.clone()
    assert gradient.abs().max() > 0
    start = group.detach().clone()
    generator = torch.Generator().manual_seed(0)
    for _ in range(directions):
        direction = torch.randn(group.shape, dtype=group.dtype, generator=generator)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                group.copy_(start + sign * eps * direction)
            pet.after_step()
            with torch.no_grad():
                ends.append(float(loss()))
        measured = (ends[0] - ends[1]) / (2 * eps)
        assert measured == pytest.approx(float(gradient @ direction), rel=1e-5, abs=1e-6)
    with torch.no_grad():
        group.copy_(start)
    pet.after_step()


@pytest.mark.parametrize("density", [0.01, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_masked_gradients_are_the_dense_ones_at_the_masked_entries(
    name: str, density: float
) -> None:
    inputs = batch(name)
    dense = backbone(name).model
    for parameter in dense.parameters():
        parameter.requires_grad_(True)
    loss_of(dense, inputs).backward()
    gradients = {key: p.grad for key, p in dense.named_parameters()}

    base = backbone(name)
    mask = mask_of(base, density)
    pet = PetModel(base, mask, Structure(), seed=0)
    pet.zero_grad()
    loss_of(pet.model, inputs).backward()
    for masked in pet._mask.weights:
        wanted = gradients[masked.name].flatten()[mask.positions[masked.name].sort().values]
        got = masked.trainable.grad
        assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max().clamp(min=1.0)


def test_a_gradient_of_the_shape_of_a_masked_weight_never_exists() -> None:
    base = backbone("bert")
    pet = PetModel(base, mask_of(base, 0.05), Structure(), seed=0)
    inputs = batch("bert", tokens=11)
    shapes = {tuple(m.weight.shape) for m in pet._mask.weights} | {(32, 64)}
    shapes -= {(32, 32)}  # a shape of activations too

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.made: list[tuple[int, ...]] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.layout == torch.strided:
                fresh = not any(
                    isinstance(a, Tensor)
                    and a.layout == torch.strided
                    and a.untyped_storage().data_ptr() == out.untyped_storage().data_ptr()
                    for a in args
                )
                if fresh:
                    self.made.append(tuple(out.shape))
            return out

    loss = loss_of(pet.model, inputs)
    with Watch() as watch:
        loss.backward()
    assert watch.made, "nothing was watched"
    assert not shapes & set(watch.made)
    for masked in pet._mask.weights:
        assert masked.weight.grad is None
        assert not masked.weight.requires_grad


def test_backward_leaves_out_tokens_without_a_gradient_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = batch("bert", rows=8, tokens=24)
    gradients, kept = [], []
    for with_look in (True, False):
        base = backbone("bert")
        pet = PetModel(base, mask_of(base, 0.05), Structure(), seed=0)
        look = dense_module._live if with_look else lambda g: None
        monkeypatch.setattr(
            dense_module, "_live", lambda g, look=look: kept.append(look(g)) or kept[-1]
        )
        loss_of(pet.model, inputs).backward()
        gradients.append(pet._storage.gradient.clone())
        monkeypatch.undo()
    assert any(live is not None and len(live) == 8 for live in kept), "no layer read first tokens"
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)


def test_backward_stops_below_the_lowest_trained_layer() -> None:
    base = backbone("bert")
    mask = mask_of(base, 0.05)
    upper = {key: value for key, value in mask.positions.items() if "layer.1." in key}
    pet = PetModel(base, type(mask)(upper, mask.sizes), Structure(), seed=0)
    seen = []
    layers = pet.model.bert.encoder.layer
    for layer in layers:
        layer.register_forward_hook(lambda m, i, o: seen.append(o.requires_grad))
    pet.model(**batch("bert"))
    assert seen == [False, True]


@pytest.mark.parametrize("name", ["bert", "t5", "gpt2", "llama"])
def test_a_masked_layer_keeps_no_input_that_can_be_made_again(name: str) -> None:
    def saved(with_mask: bool) -> int:
        base = backbone(name)
        mask = mask_of(base, 0.05) if with_mask else None
        structure = structure_of(base, "lnfit")
        pet = PetModel(base, mask, structure, seed=0)
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.dim() > 1 and not isinstance(tensor, nn.Parameter):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = loss_of(pet.model, batch(name, rows=4, tokens=16))
        del loss
        return sum(storages.values())

    # What no norm or activation makes is kept: here the input of the lowest layer, and the
    # merged heads where attention does not keep them itself.
    one_input = 4 * 16 * 32 * 4
    layers = {"t5": 4}.get(name, 2)
    assert saved(True) - saved(False) <= (1 + layers) * one_input


def test_a_second_backward_on_a_retained_graph_gives_the_same_gradient() -> None:
    base = backbone("bert")
    pet = PetModel(base, mask_of(base), Structure(), seed=0)
    loss = loss_of(pet.model, batch("bert"))
    loss.backward(retain_graph=True)
    first = pet._storage.gradient.clone()
    pet.zero_grad()
    loss.backward()
    assert torch.equal(first, pet._storage.gradient)


def test_an_input_changed_in_place_before_backward_is_noticed() -> None:
    x, weight, bias, positions = _case(False, 0.2, torch.float32)
    mask, v = _masked(weight, positions)
    y = dense(x, weight, bias, LinearSpec(False, mask.weights[0]), [v])
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_half_precision_activations_are_cast_for_the_sampled_product() -> None:
    inputs = batch("bert")
    gradients = []
    for half in (False, True):
        base = backbone("bert")
        pet = PetModel(base, mask_of(base, 0.05), Structure(), seed=0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            loss = loss_of(pet.model, inputs)
        loss.float().backward()
        assert pet._storage.gradient.dtype == torch.float32
        gradients.append(pet._storage.gradient.clone())
    cosine = nn.functional.cosine_similarity(gradients[0], gradients[1], dim=0)
    assert cosine > 0.98
