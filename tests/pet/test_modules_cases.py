"""Numbers computed apart from the code, on models so small that they are written out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedpet.backbone.pretrained import Backbone
from fedpet.pet.mask import Mask
from fedpet.pet.model import PetModel
from fedpet.pet.modules import BitFit, HiwiBias, HiwiWeight
from fedpet.pet.structure import Structure

CASES = json.loads((Path(__file__).parents[1] / "cases" / "pafi_hiwi_cases.json").read_text())


def _vector(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


class _OneWeight(nn.Module):
    """A model that is one dense layer without a bias."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        with torch.no_grad():
            self.layer.weight.copy_(weight)
        self.requires_grad_(False)


def _pet(weight: Tensor, positions: Tensor) -> PetModel:
    model: Any = _OneWeight(weight)
    base = Backbone("case", Path("."), model, (), "0" * 64)
    mask = Mask({"layer.weight": positions}, {"layer.weight": weight.numel()})
    return PetModel(base, mask, Structure(), seed=0)


@pytest.mark.parametrize("decay", [True, False])
def test_masked_adamw_decays_towards_the_checkpoint_and_leaves_the_rest(decay: bool) -> None:
    case = CASES["masked_adamw"]
    given, expected = case["inputs"], case["expected"]
    w0 = _vector(given["w0"])
    chosen = _vector(given["mask"]).nonzero().flatten()
    pet = _pet(w0[None], chosen)
    optimiser = torch.optim.AdamW(
        pet.parameter_groups().values(),
        lr=given["lr"],
        betas=(given["beta1"], given["beta2"]),
        eps=given["eps"],
        weight_decay=given["weight_decay"] if decay else 0.0,
        fused=True,
    )
    for gradient, norm in zip(given["grads"], expected["grad_l2_norm_masked"], strict=True):
        pet.zero_grad()
        # the weight's gradient is the input: one output, one row
        pet.model.layer(_vector(gradient)[None]).sum().backward()
        groups = list(pet.parameter_groups().values())
        clipped = nn.utils.clip_grad_norm_(groups, float("inf"))
        assert float(clipped) == pytest.approx(norm, abs=1e-12)
        optimiser.step()
        pet.after_step()
    key = (
        "c_delta_parametrisation_decay_towards_pretrained" if decay else "d_compact_values_no_decay"
    )
    weight = pet.model.layer.weight[0]
    torch.testing.assert_close(weight.detach(), _vector(expected[key]), rtol=0, atol=1e-12)
    outside = torch.ones(len(w0), dtype=torch.bool)
    outside[chosen] = False
    assert torch.equal(weight[outside], w0[outside])


@pytest.mark.parametrize("model", CASES["hiwi_accounting"]["expected"])
def test_hiwi_on_biases_sends_the_same_number_of_values_at_every_rank(model: str) -> None:
    expected = CASES["hiwi_accounting"]["expected"][model]
    d, d_ff, layers = expected["d_model"], expected["d_ff"], expected["ffn_layers"]
    up, down = nn.Linear(1, d_ff), nn.Linear(1, d)
    for inner in (False, True):
        key = "hiwi_trainable_with_inner_bias" if inner else "hiwi_trainable_no_inner_bias"
        for rank, trainable in expected[key].items():
            pair = [HiwiBias("x", m, int(rank), 1.0, inner) for m in (up, down)]
            assert (
                layers * sum(m.num_values for m in pair)
                == (expected["ffn_bias_entries_fc1_plus_fc2"])
            )
            shapes = [torch.Size(shape).numel() for m in pair for shape in m.shapes]
            assert layers * sum(shapes) == trainable
    assert layers * d_ff == expected["fc1_only_entries"]


def _hiwi(
    bias: Tensor, down: Any, up: Any, scale: float, inner: tuple[Any, Any] | None = None
) -> HiwiBias:
    layer = nn.Linear(1, len(bias), dtype=torch.float64)
    with torch.no_grad():
        layer.bias.copy_(bias)
    adapter = HiwiBias("x", layer, len(down[0]), scale, inner is not None)
    trainables = [_vector(down), _vector(up), *(() if inner is None else map(_vector, inner))]
    adapter.bind([t.requires_grad_() for t in trainables])
    return adapter


def test_hiwi_moves_a_bias_as_computed_by_hand() -> None:
    case = CASES["hiwi_bias"]
    given, expected = case["inputs"], case["expected"]
    b = _vector(given["b"])
    for scale, key in ((1.0, "bprime_relu_s1"), (2.0, "bprime_relu_s2")):
        adapter = _hiwi(b, given["Wd"], given["Wu"], scale)
        torch.testing.assert_close(b + adapter.read(), _vector(expected[key]), rtol=0, atol=1e-12)
    adapter = _hiwi(b, given["Wd"], given["Wu"], 1.0)
    (adapter.effect(None) * _vector(given["dL_dbprime"])).sum().backward()
    down, up = adapter.trainables
    torch.testing.assert_close(up.grad, _vector(expected["dL_dWu"]), rtol=0, atol=1e-12)
    torch.testing.assert_close(down.grad, _vector(expected["dL_dWd"]), rtol=0, atol=1e-12)


def test_a_bias_of_zeros_moves_by_its_inner_biases_alone() -> None:
    case = CASES["hiwi_bias"]
    given, expected = case["inputs"], case["expected"]
    zero = torch.zeros(4, dtype=torch.float64)
    stuck = _hiwi(zero, given["Wd"], given["Wu"], 1.0)
    assert stuck.read().tolist() == expected["bprime_when_b_is_zero_no_inner_bias"]
    stuck.effect(None).sum().backward()
    assert not stuck.trainables[1].grad.any()
    inner = (given["inner_bias_down"], given["inner_bias_up"])
    adapter = _hiwi(zero, given["Wd"], given["Wu"], 1.0, inner)
    wanted = _vector(expected["bprime_when_b_is_zero_with_inner_bias"])
    torch.testing.assert_close(adapter.read(), wanted, rtol=0, atol=1e-12)


def test_a_bias_that_is_zero_in_the_checkpoint_gets_inner_biases_and_learns() -> None:
    layer = nn.Linear(3, 4)
    with torch.no_grad():
        layer.bias.zero_()
    adapter = HiwiBias("x", layer, 2, 1.0)
    assert len(adapter.shapes) == 4
    adapter.bind([torch.zeros(shape, requires_grad=True) for shape in adapter.shapes])
    adapter.write(torch.zeros(4), seed=0)
    assert not adapter.read().any()
    adapter.effect(None).sum().backward()
    assert any(t.grad.abs().max() > 0 for t in adapter.trainables)


def test_the_mean_of_clients_is_the_mean_of_their_changes_on_the_shared_mask() -> None:
    case = CASES["shared_mask"]
    given, expected = case["inputs"], case["expected"]
    w0, positions = _vector(given["w0"]), torch.tensor(given["flat_indices"])
    share = _vector(given["n"]) / sum(given["n"])
    pet = _pet(w0.view(2, 5), positions)
    sent = []
    for change in given["client_deltas"]:
        pet.set_delta(torch.tensor(change), seed=0)
        sent.append(pet.get_delta())
        assert sent[-1].numpy().nbytes == expected["upload_bytes_per_client_shared_mask"]
    mean = sum(s * v for s, v in zip(share, sent, strict=True))
    wanted = _vector(expected["mean_delta_on_mask"])
    torch.testing.assert_close(mean.double(), wanted, rtol=0, atol=1e-7)
    pet.set_delta(mean.float(), seed=0)
    merged = pet.merged().layer.weight.flatten()
    torch.testing.assert_close(merged, _vector(expected["w_new"]), rtol=0, atol=1e-7)


def test_averaging_merged_biases_is_not_merging_averaged_adapters() -> None:
    case = CASES["shared_mask"]
    given, expected = case["inputs"]["hiwi"], case["expected"]
    b = _vector(given["b"])
    sent = []
    for client in ("1", "2"):
        adapter = _hiwi(b, given[f"Wd_{client}"], given[f"Wu_{client}"], 1.0)
        sent.append(adapter.read())
        wanted = _vector(expected[f"hiwi_bprime_{client}"])
        torch.testing.assert_close(b + sent[-1], wanted, rtol=0, atol=1e-12)
    wanted = _vector(expected["hiwi_mean_of_merged_biases"])
    torch.testing.assert_close(b + (sent[0] + sent[1]) / 2, wanted, rtol=0, atol=1e-12)
    down = (_vector(given["Wd_1"]) + _vector(given["Wd_2"])) / 2
    up = (_vector(given["Wu_1"]) + _vector(given["Wu_2"])) / 2
    wrong = b + _hiwi(b, down.tolist(), up.tolist(), 1.0).read()
    wanted = _vector(expected["hiwi_merge_of_mean_adapters"])
    torch.testing.assert_close(wrong, wanted, rtol=0, atol=1e-12)


def test_hiwi_on_a_weight_is_the_published_form_with_its_down_projection_frozen() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 4, dtype=torch.float64)
    module = HiwiWeight("x", layer, 3, 0.5, seed=1)
    (shape,) = module.shapes
    up = torch.randn(shape, dtype=torch.float64)  # Wu transposed, (4, 3)
    module.bind([up])
    constant, _ = module.factors()  # f(W0 Wd), transposed: (3, 5)
    x = torch.randn(7, 5, dtype=torch.float64)
    w0 = layer.weight.detach().T  # (5, 4), as the paper writes it
    wanted = x @ (w0 + 0.5 * constant.T @ up.T) + layer.bias
    adapted = layer(x) + module.effect(x)
    torch.testing.assert_close(adapted, wanted)
    # rank of the change, and what it is read off: scaling W0 scales C
    assert torch.linalg.matrix_rank(constant.T @ up.T) <= 3
    with torch.no_grad():
        layer.weight.mul_(2)
    doubled = HiwiWeight("x", layer, 3, 0.5, seed=1)
    doubled.bind([up])
    torch.testing.assert_close(doubled.factors()[0], 2 * constant)


def test_a_bias_with_two_modules_is_sent_once_with_both_changes() -> None:
    layer = nn.Linear(3, 4)
    bitfit, adapter = BitFit("x", layer), HiwiBias("x", layer, 2, 1.0)
    adapter.carried, bitfit.adapter = True, adapter
    bitfit.bind([torch.zeros(4)])
    adapter.bind([torch.zeros(shape) for shape in adapter.shapes])
    assert (bitfit.num_values, adapter.num_values) == (4, 0)
    start = torch.tensor([0.5, -0.25, 0.125, 1.0])
    bitfit.write(start, seed=3)
    assert torch.equal(bitfit.read(), start)
    adapter.trainables[1].fill_(1.0)
    both = bitfit.read() - start
    assert both.abs().max() > 0
    assert torch.equal(both, (start + adapter.effect(None)) - start)
