"""Test the role table on every architecture, and what it does without a name."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from architectures import ARCHITECTURES, backbone
from torch import nn

from fedpet.backbone.module_roles import find_target_modules, maskable_weights

_ATTENTION = {"query": 2, "key": 2, "value": 2, "attention-output": 2}
_FFN = {"ffn-up": 2, "ffn-down": 2}
_BLOCKS = {"self-attention": 2, "ffn": 2, "activation": 2}
_ENCODER = {**_ATTENTION, **_FFN, **_BLOCKS, "attention-norm": 2, "ffn-norm": 2}
_T5 = {
    **{role: 4 for role in (*_ATTENTION, *_FFN, *_BLOCKS, "attention-norm", "ffn-norm")},
    **{role: 2 for role in ("cross-query", "cross-key", "cross-value")},
    "cross-attention-output": 2,
    "cross-attention-norm": 2,
    "final-norm": 2,
}
_CAUSAL = {**_ATTENTION, **_FFN, **_BLOCKS, "attention-norm": 2, "ffn-norm": 2, "final-norm": 1}
EXPECTED = {
    "bert": {**_ENCODER, "pooler": 1},
    "roberta": _ENCODER,
    "distilbert": _ENCODER,
    "mpnet": _ENCODER,
    "albert": {**{role: count // 2 for role, count in _ENCODER.items()}, "pooler": 1},
    "deberta-v2": _ENCODER,
    "electra": _ENCODER,
    "t5": _T5,
    "t5-gated": {**_T5, "ffn-gate": 4},
    "gpt2": {
        "query-key-value": 2,
        **{k: v for k, v in _CAUSAL.items() if k not in ("query", "key", "value")},
    },
    "llama": {**_CAUSAL, "ffn-gate": 2},
    "vit": {**_ENCODER, "final-norm": 1},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_part_of_every_architecture_has_its_role(name: str) -> None:
    base = backbone(name)
    found = Counter(p.role for p in find_target_modules(base.model, base.head))
    assert dict(found) == EXPECTED[name]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layers_count_from_zero_in_each_stack(name: str) -> None:
    base = backbone(name)
    positions = find_target_modules(base.model, base.head)
    stacks = {p.stack for p in positions}
    wanted = {"t5": {"encoder", "decoder"}, "t5-gated": {"encoder", "decoder"}}
    wanted |= {"gpt2": {"decoder"}, "llama": {"decoder"}}
    assert stacks == wanted.get(name, {"encoder"})
    layers = 1 if name == "albert" else 2
    for stack in stacks:
        assert {p.layer for p in positions if p.stack == stack} - {None} == set(range(layers))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_mask_chooses_from_all_dense_weights_of_the_layers_and_from_nothing_else(
    name: str,
) -> None:
    base = backbone(name)
    scope = maskable_weights(base.model, base.head)
    pooler = {n for n in scope if "pooler" in n}
    assert pooler == ({n for n in scope if "pooler" in n} if name in ("bert", "albert") else set())
    in_layers = {
        key
        for key, parameter in base.model.named_parameters()
        if parameter.dim() == 2
        and any(f".{part}." in key for part in ("layer", "layers", "h", "block", "albert_layers"))
        and "relative_attention_bias" not in key
    }
    assert set(scope) - pooler == in_layers
    assert not set(scope) & set(base.head)
    order = [key for key, _ in base.model.named_parameters()]
    assert [order.index(key) for key in scope] == sorted(order.index(key) for key in scope)


def test_a_shared_layer_and_a_tied_weight_are_counted_once() -> None:
    albert = backbone("albert")
    assert albert.model.config.num_hidden_layers == 2
    assert len(maskable_weights(albert.model, albert.head)) == 6 + 1

    bert = backbone("bert")
    layers = bert.model.bert.encoder.layer
    layers[1].intermediate.dense.weight = layers[0].intermediate.dense.weight
    scope = maskable_weights(bert.model, bert.head)
    assert len(scope) == 2 * 6 + 1 - 1
    assert "bert.encoder.layer.0.intermediate.dense.weight" in scope


def test_newly_initialised_modules_are_no_positions() -> None:
    base = backbone("bert")
    head = (*base.head, "bert.pooler.dense.weight", "bert.pooler.dense.bias")
    assert not [p for p in find_target_modules(base.model, head) if p.role == "pooler"]


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixing = nn.Linear(8, 8)
        self.heads = nn.MultiheadAttention(8, 2)
        self.scaling = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scaling(self.mixing(x))


class _Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.stages = nn.Sequential(_Block(), _Block(), _Block())
        self.out = nn.Linear(8, 2)


def test_an_unknown_model_falls_back_to_all_linears_and_norms_of_its_repeated_blocks() -> None:
    positions = find_target_modules(_Unknown())
    roles = Counter((p.kind, p.role) for p in positions)
    assert roles == {("linear", "other-linear"): 3, ("norm", "other-norm"): 3}
    assert [p.layer for p in positions if p.kind == "linear"] == [0, 1, 2]


def test_a_linear_that_its_parent_never_calls_is_no_position() -> None:
    names = {p.name for p in find_target_modules(_Unknown())}
    assert not any("out_proj" in name for name in names)


def test_sizes_are_in_and_out_whatever_way_the_weight_lies() -> None:
    base = backbone("gpt2")
    fused = next(
        p for p in find_target_modules(base.model, base.head) if p.role == "query-key-value"
    )
    assert (fused.kind, fused.in_features, fused.out_features) == ("conv1d", 32, 96)
    assert fused.has_bias
