"""The table of a mask: where its entries lie, and what it costs to tell them."""

from __future__ import annotations

import math

import pytest
import torch
from report_runs import to_text
from torch import nn

from fedpet.backbone.module_roles import maskable_weights
from fedpet.config import MaskConfig
from fedpet.pet.mask import Mask, build_mask
from fedpet.protocol.plan import encode_mask
from fedpet.report.mask_table import bar, derived_mask_bytes, entropy_bytes, mask_shares, mask_table


@pytest.fixture(scope="module")
def model() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=50,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=16,
        )
    )


@pytest.fixture(scope="module")
def mask(model: nn.Module) -> Mask:
    return build_mask(
        maskable_weights(model, ["classifier.weight", "classifier.bias"]), MaskConfig(density=0.05)
    )


def test_every_entry_is_counted_once_by_layer_and_once_by_role(
    model: nn.Module, mask: Mask
) -> None:
    for shares in mask_shares(mask.sizes, mask.positions, model):
        assert sum(share.chosen for share in shares) == mask.num_values
        assert sum(share.entries for share in shares) == sum(mask.sizes.values())


def test_layers_and_roles_go_by_the_names_of_the_role_table(model: nn.Module, mask: Mask) -> None:
    layers, roles = mask_shares(mask.sizes, mask.positions, model)
    assert [share.name for share in layers] == [
        "layer 0",
        "layer 1",
        "layer 2",
        "outside the layers",
    ]
    assert [share.name for share in roles] == [
        "query",
        "key",
        "value",
        "attention-output",
        "ffn-up",
        "ffn-down",
        "pooler",
    ]


def test_a_model_the_role_table_does_not_know_is_grouped_by_its_names() -> None:
    weights = {"x.blocks.0.w": torch.arange(8.0), "x.blocks.1.w": torch.arange(8.0)}
    mask = build_mask(weights, MaskConfig(density=0.5))
    layers, roles = mask_shares(mask.sizes, mask.positions, nn.Identity())
    assert [share.name for share in layers] == ["layer 0", "layer 1"]
    assert [(share.name, share.chosen) for share in roles] == [("x.blocks.*.w", 8)]


def test_the_entropy_bound_is_that_of_each_tensor_apart() -> None:
    mask = Mask({"a": torch.arange(4), "b": torch.arange(8)}, {"a": 8, "b": 8, "c": 100})
    assert entropy_bytes(mask) == 1.0  # 8 entries at one bit each; full and empty tensors cost none
    third = Mask({"a": torch.arange(100)}, {"a": 300})
    bits = -(math.log2(1 / 3) + 2 * math.log2(2 / 3)) / 3
    assert entropy_bytes(third) == pytest.approx(300 * bits / 8)


def test_a_derived_mask_takes_at_most_128_bytes(mask: Mask) -> None:
    config = MaskConfig(density=0.000123456789, rule="random", granularity="per-tensor", seed=2**31)
    assert 40 < derived_mask_bytes(mask, config) <= 128


@pytest.mark.parametrize("rule", ["smallest", "largest", "random"])
def test_a_masks_table_holds_its_numbers(model: nn.Module, rule: str) -> None:
    config = MaskConfig(density=0.05, rule=rule)
    scope = maskable_weights(model)
    mask = build_mask(scope, config)
    coded = len(encode_mask(mask))
    text = " ".join(to_text(mask_table(mask, config, model, coded)).split())
    magnitudes = torch.cat([scope[n].abs().flatten()[p] for n, p in mask.positions.items()])
    assert f"{mask.num_values:,} of {sum(mask.sizes.values()):,} entries" in text
    assert f"magnitude, largest {magnitudes.max():.3g} (smallest {magnitudes.min():.3g})" in text
    assert f"{8 * coded / mask.num_values:.2f} bits a value" in text
    assert "layer 2" in text
    assert "ffn-down" in text


def test_a_bar_is_as_long_as_its_fraction() -> None:
    assert bar(0) == ""
    assert bar(0.5) == "█" * 12
    assert bar(1) == "█" * 24
    assert len(bar(2)) == 24
