"""Small random models of every architecture, as backbones, with something to feed them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedpet.backbone.module_roles import find_target_modules, maskable_weights
from fedpet.backbone.pretrained import Backbone
from fedpet.config import MaskConfig
from fedpet.data import Rows
from fedpet.pet.mask import Mask, build_mask
from fedpet.pet.model import PetModel
from fedpet.pet.structure import ModuleSpec, Structure, preset
from fedpet.training.input_checks import settle_padding

_HEADS = ("classifier", "score", "classification_head", "pre_classifier", "pooler.dense")
_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 60,
    "max_position_embeddings": 40,
}

_PADDED_WITH_0 = Rows(np.array([5, 6]), np.array([0, 2]), np.zeros(1), None, pad_id=0)


def _configs() -> dict[str, Callable[[], Any]]:
    import transformers as t

    t5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 60}
    t5["decoder_start_token_id"] = 0
    return {
        "bert": lambda: t.BertConfig(**_SIZES),
        "roberta": lambda: t.RobertaConfig(**_SIZES),
        "distilbert": lambda: t.DistilBertConfig(
            dim=32, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=60, max_position_embeddings=40
        ),
        "mpnet": lambda: t.MPNetConfig(**_SIZES),
        "albert": lambda: t.AlbertConfig(**_SIZES, embedding_size=16),
        "deberta-v2": lambda: t.DebertaV2Config(
            **_SIZES,
            relative_attention=True,
            pos_att_type=["c2p", "p2c"],
            position_buckets=8,
            share_att_key=True,
            norm_rel_ebd="layer_norm",
        ),
        "electra": lambda: t.ElectraConfig(**_SIZES, embedding_size=16),
        "t5": lambda: t.T5Config(**t5, feed_forward_proj="relu"),
        "t5-gated": lambda: t.T5Config(**t5, feed_forward_proj="gated-gelu"),
        "gpt2": lambda: t.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=60, n_positions=40),
        "llama": lambda: t.LlamaConfig(**_SIZES, num_key_value_heads=2),
        "vit": lambda: t.ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            image_size=16,
            patch_size=4,
        ),
    }


ARCHITECTURES = tuple(_configs())


@functools.cache
def _pretrained(name: str) -> Mapping[str, Tensor]:
    """One random state of each architecture; biases and gains too, unlike in a fresh model."""
    model = _model(name)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.empty_like(parameter).normal_(0, 0.1, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(noise)
            else:
                parameter.copy_(noise)
    return {key: value.clone() for key, value in model.state_dict().items()}


def _model(name: str) -> Any:
    import transformers as t

    config = _configs()[name]()
    if name == "vit":
        return t.ViTForImageClassification(config).eval()
    model = t.AutoModelForSequenceClassification.from_config(config).eval()
    settle_padding(model, _PADDED_WITH_0)  # GPT-2 and Llama ship without
    return model


def backbone(name: str, dtype: torch.dtype = torch.float32) -> Backbone:
    """A fresh copy of the architecture's one random model, frozen."""
    model = _model(name)
    model.load_state_dict(dict(_pretrained(name)))
    model.to(dtype).requires_grad_(False)
    if dtype == torch.float64:
        for module in model.modules():
            if type(module).__name__ in ("T5LayerNorm", "LlamaRMSNorm"):
                module.forward = functools.partial(_rms_norm, module)
    head = tuple(
        key
        for key, _ in model.named_parameters()
        if key.startswith(_HEADS) and not key.startswith("pooler.activation")
    )
    return Backbone("random", Path("."), model, head, "0" * 64)


def _rms_norm(norm: Any, x: Tensor) -> Tensor:
    """Compute the norm in the type it is given; transformers' own computes in float32."""
    return norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)


def batch(name: str, rows: int = 3, tokens: int = 9, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of one batch; the last row is padded where there is such a thing."""
    generator = torch.Generator().manual_seed(seed)
    if name == "vit":
        return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=generator)}
    ids = torch.randint(5, 60, (rows, tokens), generator=generator)
    attention = torch.ones_like(ids)
    if name.startswith("t5"):
        ids[:, -1] = 1  # its head reads the last end-of-sequence token
    elif name == "gpt2":
        pass  # its head reads the last token that is not padding
    else:
        attention[-1, tokens // 2 :] = 0
    return {"input_ids": ids, "attention_mask": attention}


def mask_of(base: Backbone, density: float = 0.1) -> Mask:
    return build_mask(maskable_weights(base.model, base.head), MaskConfig(density=density))


def structure_of(base: Backbone, names: str, rank: int = 2, scale: float = 2.0) -> Structure:
    return preset(names, find_target_modules(base.model, base.head), rank=rank, scale=scale)


def biases_of_norms(base: Backbone) -> Structure:
    """A bias at every norm, also where there was none (T5, Llama)."""
    positions = find_target_modules(base.model, base.head)
    return Structure(tuple(ModuleSpec("bitfit", p.name) for p in positions if p.kind == "norm"))


def loss_of(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """A loss in which every output counts."""
    logits = model(**inputs).logits
    target = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    return (logits - target).square().sum()


def moved_pet(base: Backbone, kinds: str, density: float = 0.1) -> PetModel:
    """A mask and these kinds on a backbone, at a point that is not the checkpoint."""
    pet = PetModel(base, mask_of(base, density), structure_of(base, kinds), seed=7)
    generator = torch.Generator().manual_seed(3)
    pet.set_delta(0.05 * torch.randn(pet.num_values, generator=generator), seed=1)
    return pet


def gradient_of(pet: PetModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """The gradients of all that is trained, one behind the other."""
    pet.zero_grad()
    loss_of(pet.model, inputs).backward()
    return torch.cat([group.grad.flatten().clone() for group in pet.parameters()])


def train(
    pet: PetModel, inputs: Mapping[str, Tensor], steps: int = 1, rate: float = 1e-2
) -> list[float]:
    """Some steps of AdamW on one batch; the losses."""
    optimiser = torch.optim.AdamW(pet.parameter_groups().values(), lr=rate, fused=True)
    losses = []
    for _ in range(steps):
        pet.zero_grad()
        loss = loss_of(pet.model, inputs)
        loss.backward()
        optimiser.step()
        pet.after_step()
        losses.append(float(loss.detach()))
    return losses
