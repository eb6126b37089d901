"""Small random models that read pixels, with their image processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

MODELS = ("vit", "dinov2")
SIZE = 28
PROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 32},
    "do_center_crop": True,
    "crop_size": {"height": SIZE, "width": SIZE},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "do_convert_rgb": True,
    "resample": 3,
}


def model_of(name: str, *, classifies: bool = True) -> Any:
    """Make a random ViT or DINOv2; without a classifier as a checkpoint has it."""
    import transformers as t

    torch.manual_seed(0)
    size = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": SIZE,
    }  # fmt: skip
    if name == "vit":
        config: Any = t.ViTConfig(**size, intermediate_size=64, patch_size=7)
    else:
        config = t.Dinov2Config(**size, mlp_ratio=2, patch_size=14)
    make: Any = t.AutoModelForImageClassification if classifies else t.AutoModel
    model = make.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def save_model(folder: Path, name: str) -> Path:
    """Save a model without a classifier, with its processor."""
    model_of(name, classifies=False).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder
