"""Build a backbone without its weights, on torch's meta device.

The configuration is a file, a folder with it, a hub name, or `package:NAME`. The head's parameters
are read off the checkpoint where one lies beside it: its header names tensors and shapes. Where
there is none, the head is what the task's class adds to the architecture's base model; a pooler of
the base model then counts as pretrained.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fedpet.backbone.checkpoint import CONFIG_FILE, resolve_config, weight_files
from fedpet.backbone.classifier import head_names, lost_names, output_layer, outside_base
from fedpet.backbone.pretrained import Backbone, class_for
from fedpet.config import BackboneConfig
from fedpet.errors import BackboneError
from fedpet.tasks import Task, kind_of

__all__ = ["outline"]

Shapes = Mapping[str, tuple[int, ...]]


def outline(config: BackboneConfig, task: Task) -> Backbone:
    """Build a backbone's outline for a task.

    Args:
        config: Its model may name a folder without weights, or a config.json.
        task: Says which head it has, if any.

    Returns:
        The backbone on the meta device. Its fingerprint is "": there are no numbers to take it of.

    Raises:
        BackboneError: There is no such configuration, or none that a class can be built from.
    """
    from transformers import AutoConfig
    from transformers.utils import logging as transformers_logging

    kind, file = kind_of(task), resolve_config(config)
    transformers_logging.set_verbosity_error()
    try:
        model_config = AutoConfig.from_pretrained(file, trust_remote_code=False)
        model_config.num_labels = task.num_outputs
        kind.set_labels(model_config, task.label_names)
        with torch.device("meta"):
            made = class_for(model_config, kind.model_class)
            model = made.from_config(model_config, dtype=torch.float32)
    except Exception as error:  # transformers raises many kinds, of several libraries
        reason = " ".join(str(error).split())
        raise BackboneError(
            f"{config.model!r} is no configuration of a model for {kind.model_class} "
            f"({type(error).__name__}: {reason[:200]}). Give a config.json as `save_pretrained` "
            "writes it."
        ) from None
    model.requires_grad_(False)
    model.eval()
    stored = _stored_shapes(file.parent) if file.name == CONFIG_FILE else None
    head = _head(model, stored) if kind.has_head else ()
    return Backbone(config.model, file.parent, model, head, "", trains_head=config.head != "keep")


def _head(model: Any, stored: Shapes | None) -> tuple[str, ...]:
    """Return the names of the head's parameters, in the order of the model."""
    if stored is None:
        return outside_base(model)
    prefix = f"{model.base_model_prefix}."
    lacking = {
        name
        for name, parameter in model.named_parameters()
        if not any(stored.get(n) == tuple(parameter.shape) for n in _spellings(name, prefix))
    }
    # transformers renames tensors of some old checkpoints while it loads them. Where the body
    # seems to be missing, its names were other ones: go by the architecture.
    if lost_names(model, lacking):
        return outside_base(model)
    has_output_layer = any(
        spelling in stored for name in output_layer(model) for spelling in _spellings(name, prefix)
    )
    return head_names(model, lacking, has_output_layer=has_output_layer)


def _spellings(name: str, prefix: str) -> tuple[str, ...]:
    """Return a parameter's names in checkpoints: with or without the base model's prefix."""
    plain = name.removeprefix(prefix)
    old = plain.replace("LayerNorm.weight", "LayerNorm.gamma")
    old = old.replace("LayerNorm.bias", "LayerNorm.beta")
    return (name, plain, prefix + plain, old, prefix + old)


def _stored_shapes(folder: Path) -> Shapes | None:
    """Read the shapes of a checkpoint's tensors from its header; None where there is none."""
    from safetensors import safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    try:
        files = weight_files(folder)
        for file in files:
            if file.suffix == ".bin":
                stored = torch.load(file, map_location="meta", mmap=True, weights_only=True)
                shapes |= {name: tuple(tensor.shape) for name, tensor in stored.items()}
                continue
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - it is no dict
                    shapes[name] = tuple(tensors.get_slice(name).get_shape())
        return shapes if files else None
    except Exception as error:  # a damaged file raises kinds of three libraries
        raise BackboneError(
            f"the checkpoint in {str(folder)!r} does not read ({type(error).__name__}: "
            f"{str(error)[:160]}). Mend or remove it: the config.json alone is enough here."
        ) from None
