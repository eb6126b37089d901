"""Take a large checkpoint through mask, merge and writing, and print each stage's peak of memory.

Run as a program: `python memory_job.py write FOLDER`, then `python memory_job.py read FOLDER
DTYPE SHARED`. "before" is what the process held with everything imported, and "own" the memory
that a step has left it with beside the map of the checkpoint's file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from tiny import make_tokenizer

from fedpet.backbone.module_roles import find_target_modules, maskable_weights
from fedpet.backbone.pretrained import load_backbone
from fedpet.config import BackboneConfig, MaskConfig
from fedpet.export.plain_model import write_model
from fedpet.pet.mask import build_mask
from fedpet.pet.model import PetModel
from fedpet.pet.structure import preset

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": 50}
LARGE = {"hidden_size": 768, "intermediate_size": 2304, "vocab_size": 2000}


def write(folder: Path, sizes: dict[str, int], dtype: torch.dtype) -> None:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, **sizes)
    with torch.device("meta"):
        model: Any = LlamaModel(config)
    model = model.to(dtype).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    model.save_pretrained(folder)
    make_tokenizer(folder)


def _bytes(file: str, key: str) -> int:
    """Read a number of the kernel's about this process."""
    lines = Path(f"/proc/self/{file}").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def go_through(folder: Path, dtype: str, shared: bool) -> dict[str, int]:
    peaks: dict[str, int] = {}

    def stage(name: str) -> None:
        peaks[name] = _bytes("status", "VmHWM")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew

    stage("before")
    own = _bytes("smaps_rollup", "Anonymous")
    config = BackboneConfig(model=str(folder), dtype=dtype, shared=shared)
    backbone = load_backbone(config, num_outputs=2)
    stage("load")
    mask = build_mask(maskable_weights(backbone.model, backbone.head), MaskConfig(density=0.005))
    stage("mask")
    positions = find_target_modules(backbone.model, backbone.head)
    pet = PetModel(backbone, mask, preset("lora+lnfit", positions, rank=2, scale=1.0), seed=0)
    pet.set_delta(0.01 * torch.ones(pet.num_values))
    stage("adapt")
    pet.model(input_ids=torch.ones(1, 4, dtype=torch.int64)).logits.sum().backward()
    stage("step")
    peaks["own"] = _bytes("smaps_rollup", "Anonymous") - own
    plain = pet.merge_and_unload()
    stage("merge")
    write_model(plain, folder, folder.with_name(f"{folder.name}-{dtype}-{shared}"))
    stage("write")
    return peaks


if __name__ == "__main__":
    command, folder = sys.argv[1], Path(sys.argv[2])
    stored = torch.bfloat16 if "bfloat16" in sys.argv else torch.float32
    if command == "write":
        write(folder, SMALL, stored)
        layers = 8 if stored == torch.float32 else 16  # 200 MB either way
        write(folder.with_name("large"), {**LARGE, "num_hidden_layers": layers}, stored)
    else:
        torch.set_num_threads(1)
        go_through(folder, sys.argv[3], sys.argv[4] == "True")  # everything is imported
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        print(json.dumps(go_through(folder.with_name("large"), sys.argv[3], sys.argv[4] == "True")))
