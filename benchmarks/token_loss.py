"""Measure a language model's training step: logits of all tokens, or of labels, a chunk at a time.

    python -m benchmarks.token_loss [--rows 8] [--tokens 128] [--labels 1.0] [--dtype float32]

A random Llama of SmolLM2-135M's shape under a mask of 0.1 %. Each way runs in a process of its
own, on one thread: processor seconds of a forward and a backward pass, the least of a few, and the
peak of the process's memory beyond what the loaded model takes (Linux, /proc).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WAYS = ("transformers' labels=", "chunks")
REPEATS = 2


def step(way: str, rows: int, tokens: int, labels: float, dtype: str) -> dict[str, float]:
    """Take the steps in this process."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from fedpet.backbone.module_roles import maskable_weights
    from fedpet.backbone.pretrained import Backbone
    from fedpet.config import MaskConfig
    from fedpet.pet.mask import build_mask
    from fedpet.pet.model import PetModel
    from fedpet.pet.structure import Structure
    from fedpet.training.token_loss import token_loss

    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    base: Any = LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()
    backbone = Backbone.of_model(base, ())
    chosen = MaskConfig(density=0.001)
    mask = build_mask(maskable_weights(base), chosen)
    pet = PetModel(backbone, mask, Structure(), seed=0, mask_config=chosen)
    ids = torch.randint(49152, (rows, tokens))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    wanted = ids.clone()
    wanted[:, : int(tokens * (1 - labels))] = -100
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew from here
    before, seconds = _memory_mb("VmRSS"), []
    for _ in range(REPEATS):
        pet.zero_grad()
        started = time.process_time()
        if way == WAYS[0]:
            loss = pet(**inputs, labels=wanted, use_cache=False).loss
        else:
            loss = token_loss(pet.model, inputs, wanted)
        loss.backward()
        seconds.append(time.process_time() - started)
    return {"seconds": min(seconds), "peak_mb": _memory_mb("VmHWM") - before, "loss": loss.item()}


def _memory_mb(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024 / 1e6


def main() -> None:
    """Print a line for each way."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--labels", type=float, default=1.0, help="fraction of a row, at its end")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--way", default="", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    settings = (asked.rows, asked.tokens, asked.labels, asked.dtype)
    if asked.way:
        print(json.dumps(step(asked.way, *settings)))
        return
    for way in WAYS:
        command = [sys.executable, "-m", "benchmarks.token_loss", *sys.argv[1:], "--way", way]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{way:24} {found['seconds']:.2f} s   {found['peak_mb']:,.0f} MB beyond the model   "
            f"loss {found['loss']:.5f}"
        )


if __name__ == "__main__":
    main()
