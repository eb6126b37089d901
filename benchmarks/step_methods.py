"""Set up the methods whose local steps `training_step` compares, each on a backbone of its own.

", first token" is a method whose passes leave out tokens that the classifier never reads
(`training.cls-only`); ", oneDNN" is one whose dense layers are multiplied by oneDNN
(`training.matmul-backend`), which the others are given too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.onednn_layers import multiply_by_onednn
from fedpet.backbone.module_roles import find_target_modules, maskable_weights
from fedpet.backbone.pretrained import Backbone, load_backbone
from fedpet.config import BackboneConfig, MaskConfig
from fedpet.pet.mask import build_mask
from fedpet.pet.model import PetModel
from fedpet.pet.structure import preset

__all__ = ["FIRST_TOKEN", "ONEDNN", "Method", "backbone", "methods"]

DENSITIES = (0.001, 0.005, 0.02, 0.05)
FIRST_TOKEN = ", first token"  # of methods whose passes training.cls-only cuts
ONEDNN = ", oneDNN"  # of methods whose dense layers oneDNN multiplies
Step = Callable[[], None]
Method = Callable[[Backbone], tuple[Any, Iterable[nn.Parameter], Step, Step]]


def methods() -> dict[str, Method]:
    """By name: backbone -> (model, what to optimise, set gradients to zero, after a step)."""
    masks = {f"fedpet-mask-{100 * d:g}%": partial(_fedpet, density=d) for d in DENSITIES}
    half = "fedpet-mask-0.5%"
    default = partial(_fedpet, density=0.001, names="lora-factors+lnfit")
    table: dict[str, Method] = {
        "full": lambda base: _plain(base, lambda name: True),
        "bitfit": lambda base: _plain(base, _is_bias),
        "peft-lora": _peft_lora,
        "peft-shira": _peft_shira,
        half: masks[half],
        half + FIRST_TOKEN: masks[half],
        **masks,
        "fedpet-default": default,
        "fedpet-default" + FIRST_TOKEN: default,
        "full" + ONEDNN: lambda base: _plain(base, lambda name: True, onednn=True),
        "bitfit" + ONEDNN: lambda base: _plain(base, _is_bias, onednn=True),
        "peft-lora" + ONEDNN: lambda base: _peft_lora(base, onednn=True),
        "peft-shira" + ONEDNN: lambda base: _peft_shira(base, onednn=True),
        half + FIRST_TOKEN + ONEDNN: partial(masks[half], products="onednn"),
        "fedpet-default" + FIRST_TOKEN + ONEDNN: partial(default, products="onednn"),
    }
    return table


def backbone(model: str) -> Backbone:
    """MiniLM, or MPNet-base with random weights: time and memory do not depend on them."""
    if model == "minilm":
        return load_backbone(BackboneConfig(), num_outputs=2)
    from transformers import MPNetConfig, MPNetForSequenceClassification

    torch.manual_seed(0)
    mpnet = MPNetForSequenceClassification(MPNetConfig()).eval().requires_grad_(False)
    head = tuple(name for name, _ in mpnet.named_parameters() if name.startswith("classifier"))
    return Backbone(model, Path("."), mpnet, head, "")


def _is_bias(name: str) -> bool:
    return name.endswith("bias") and "norm" not in name.lower() and "relative" not in name


def _plain(base: Backbone, trains: Callable[[str], bool], *, onednn: bool = False) -> Any:
    for name, parameter in base.model.named_parameters():
        parameter.requires_grad_(trains(name) or name in base.head)
    return _trained_by_torch(base.model, onednn)


def _trained_by_torch(model: Any, onednn: bool) -> Any:
    if onednn:
        multiply_by_onednn(model)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def zero() -> None:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.zero_()

    return model, parameters, zero, lambda: None


def _names(base: Backbone, *roles: str) -> list[str]:
    positions = find_target_modules(base.model, base.head)
    dense = [p for p in positions if p.kind == "linear" and p.role != "pooler"]
    return [p.name for p in dense if not roles or p.role in roles]


def _peft_lora(base: Backbone, *, onednn: bool = False) -> Any:
    from peft import LoraConfig, get_peft_model

    names = _names(base, "query", "value")
    config = LoraConfig(r=8, lora_alpha=16, target_modules=names, modules_to_save=["classifier"])
    return _trained_by_torch(get_peft_model(base.model, config).eval(), onednn)


def _peft_shira(base: Backbone, *, onednn: bool = False) -> Any:
    """Train all dense weights, at the rank with nearly as many values as the 0.5 % mask."""
    from peft import ShiraConfig, get_peft_model

    names = _names(base)
    sizes = [tuple(base.model.get_parameter(f"{name}.weight").shape) for name in names]
    wanted = 0.005 * sum(first * second for first, second in sizes)
    rank = max(1, round(wanted / sum(first + second for first, second in sizes)))
    config = ShiraConfig(r=rank, target_modules=names, modules_to_save=["classifier"])
    return _trained_by_torch(get_peft_model(base.model, config).eval(), onednn)


def _fedpet(base: Backbone, density: float, names: str = "none", products: str = "torch") -> Any:
    mask = None
    if density:
        mask = build_mask(maskable_weights(base.model, base.head), MaskConfig(density=density))
    positions = find_target_modules(base.model, base.head)
    structure = preset(names, positions, rank=8, scale=2.0)
    pet = PetModel(base, mask, structure, seed=0, products=products)
    return pet.model, pet.parameter_groups().values(), pet.zero_grad, pet.after_step
