"""Compare a GPU with the processor: masks, steps, merging, the tests, a whole federation."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.cuda_models import (
    Place,
    batch_of,
    fresh_backbone,
    mask_of,
    noted,
    pet_model,
    random_model,
)
from fedpet.backbone.module_roles import maskable_weights
from fedpet.config import Experiment, MaskConfig
from fedpet.pet.mask import Mask, build_mask

ROOT = Path(__file__).resolve().parents[1]
WORDS = ["good", "bad", "fine", "dull", "film", "plot", "cast", "score", "the", "of", "and", "is"]


def environment(place: Place) -> None:
    """Report versions, GPU and memory."""
    place.found("python", sys.version)
    place.found("torch", f"{torch.__version__}, CUDA {torch.version.cuda}")
    place.found("cores", os.cpu_count())
    versions = {}
    for package in ("flwr", "transformers", "tokenizers", "datasets", "pyarrow", "numpy", "peft"):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    place.found("versions", versions)
    place.found("tf32", torch.backends.cuda.matmul.allow_tf32)
    if place.device == "cuda":
        place.found("gpu", torch.cuda.get_device_name())
        place.found("capability", torch.cuda.get_device_capability())
        place.found("memory", torch.cuda.mem_get_info())
        with noted(place, "driver"):
            command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=20)
            place.found("driver", done.stdout.strip())


LAWS = {
    "mask": (0.01, "none"),
    "mask in blocks": (0.3, "none"),
    "lora": (0.01, "lora"),
    "lora-factors": (0.01, "lora-factors"),
    "lnfit+ln-bias": (0.01, "lnfit+ln-bias"),
    "bitfit": (0.0, "bitfit"),
    "hiwi-bias": (0.0, "hiwi-bias"),
    "hiwi-weight": (0.0, "hiwi-weight"),
    "lowrank-adapter": (0.0, "lowrank-adapter"),
    "all": (0.01, "lnfit+ln-bias+bitfit+lora+hiwi-bias+hiwi-weight+lowrank-adapter"),
}


def laws(place: Place) -> None:
    """Masks, steps, merging, and what is untouched: there, and on the processor."""
    torch.set_num_threads(max((os.cpu_count() or 1) // 4, 1))  # others run beside it
    sizes = ("tiny",) if place.tiny else ("tiny", "minilm")
    bad = []
    for size in sizes:
        vocabulary = 1000
        with noted(place, f"{size}: masks"):
            moved = fresh_backbone(size, place.device, vocabulary)
            same = {}
            for granularity in ("global", "per-tensor"):
                for rule in ("smallest", "largest", "random"):
                    config = MaskConfig(density=0.01, rule=rule, granularity=granularity)
                    here = fresh_backbone(size, "cpu", vocabulary)
                    one = build_mask(maskable_weights(here.model, here.head), config)
                    other = build_mask(maskable_weights(moved.model, moved.head), config)
                    same[f"{rule}, {granularity}"] = one.digest() == other.digest()
            place.found(f"{size}: masks are the same to the bit", same)
            bad += [f"{size}: mask of {name}" for name, equal in same.items() if not equal]
        for name, (density, names) in LAWS.items():
            if place.left() < 3:
                bad.append(f"{size}: {name} was not looked at, for want of time")
                continue
            with noted(place, f"{size}: {name}"):
                row = _law(size, density, names, place.device, vocabulary)
                place.found(f"{size}: {name}", row)
                bad += [
                    f"{size}: {name}: {what}" for what, holds in row["holds"].items() if not holds
                ]
    place.found("laws that do not hold", bad)


def _law(size: str, density: float, names: str, device: str, vocabulary: int) -> dict[str, Any]:
    mask = mask_of(size, density, vocabulary) if density else None
    expected = _steps(size, mask, names, "cpu", vocabulary)
    found = _steps(size, mask, names, device, vocabulary)
    distance = {
        key: float((found[key] - expected[key]).abs().max() / expected[key].abs().max())
        for key in ("first logits", "first gradients", "logits", "values")
    }
    merged = float((found["merged"] - found["logits"]).abs().max())
    holds = {
        "first logits to 1e-5": distance["first logits"] < 1e-5,
        "first gradients to 1e-4": distance["first gradients"] < 1e-4,
        "values to 1e-3": distance["values"] < 1e-3,
        "merged equals adapted to 1e-5": merged < 1e-5,
        "untouched is bit-identical": not found["touched"],
        "load_values gives back the same bits": found["round trip"],
        "no plain parameter was added": found["added"] == expected["added"],
    }
    return {
        "distance": {key: float(f"{value:.2e}") for key, value in distance.items()},
        "merged": float(f"{merged:.2e}"),
        "touched": found["touched"][:5],
        "holds": holds,
    }


def _steps(
    size: str, mask: Mask | None, names: str, device: str, vocabulary: int
) -> dict[str, Any]:
    """Three steps of SGD from a point that is not the checkpoint."""
    before = random_model(size, vocabulary).state_dict()
    base = fresh_backbone(size, device, vocabulary)
    pet = pet_model(base, mask, names)
    inputs, labels = batch_of(8, 24, device, vocabulary)
    start = 0.01 * torch.randn(pet.num_values, generator=torch.Generator().manual_seed(1))
    pet.set_delta(start, seed=5)
    back = bool(torch.equal(pet.get_delta(), start))
    groups = list(pet.parameter_groups().values())
    optimiser = torch.optim.SGD(groups, lr=1e-2)
    found: dict[str, Any] = {"round trip": back}
    for step in range(3):
        pet.zero_grad()
        logits = pet.model(**inputs).logits
        nn.functional.cross_entropy(logits, labels).backward()
        if not step:
            found["first logits"] = logits.detach().cpu()
            found["first gradients"] = torch.cat(
                [group.grad.flatten().cpu() for group in groups if group.grad is not None]
            )
        optimiser.step()
        pet.after_step()
    plain = pet.merged()
    with torch.no_grad():
        found["logits"] = pet.model(**inputs).logits.cpu()
        found["merged"] = plain(**inputs).logits.cpu()
    found["values"] = pet.get_delta()
    found["added"] = pet.added_parameters
    named = {segment.name for segment in pet.segments}
    found["touched"] = _touched(before, plain.state_dict(), mask, named)
    return found


def _touched(before: Any, after: Any, mask: Mask | None, named: set[str]) -> list[str]:
    """Parameters that moved although nothing names them, or outside the mask."""
    wrong = []
    for name, old in before.items():
        new = after[name].cpu()
        module = name.rpartition(".")[0]
        positions = None if mask is None else mask.positions.get(name)
        if any(one in (name, module) or one.startswith(f"{module}.") for one in named - {name}):
            continue  # a module of the structure acts here
        if positions is not None:
            old, new = old.clone().flatten(), new.clone().flatten()
            old[positions] = new[positions] = 0
        elif name in named:
            continue  # a head
        if not torch.equal(old, new):
            wrong.append(name)
    return wrong


def suite(place: Place) -> None:
    """Run the tests that ask for a GPU."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pytest", "tests/backbone/test_device.py", "-q", "-rfE"]
        command += ["-o", "filterwarnings=", "-o", "addopts=", "-p", "no:cacheprovider"]
        command += ["-k", "cuda" if place.device == "cuda" else "other_names", "--tb=short"]
        command += [f"--basetemp={folder}/pytest", f"--timeout={max(place.left() - 10, 10):.0f}"]
        if place.device == "cuda":
            command += ["-n", "4"]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *_path()])},
            capture_output=True,
            text=True,
            timeout=max(place.left() - 2, 5),
        )
    place.found("exit code", done.returncode)
    summary = [line for line in done.stdout.splitlines() if " passed" in line or " failed" in line]
    place.found("tests", summary[-1:])
    if done.returncode:
        print((done.stdout + done.stderr)[-5000:])
        raise RuntimeError("tests failed, or were not found")


def _path() -> list[str]:
    return [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]


def run(place: Place) -> None:
    """Run a whole federation in this process, twice on the GPU and once on the processor."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_rows(folder / "rows")
        for size in ("tiny",) if place.tiny else ("tiny", "minilm"):
            _write_folder(folder / size, size)
            for title, changes in RUNS.items():
                if place.left() < 10:
                    place.found(f"{size}: {title}", "left out for want of time")
                    continue
                with noted(place, f"{size}: {title}"):
                    place.found(f"{size}: {title}", _runs(folder, size, changes, place.device))


RUNS: dict[str, dict[str, dict[str, Any]]] = {
    "mask and lora, dither-3": {
        "structure": {"preset": "lnfit+lora", "rank": 4},
        "codec": {"uplink": "dither-3", "downlink": "dither-5", "downlink-mode": "full"},
    },
    "first token, tiers": {
        "structure": {"preset": "lnfit"},
        "mask": {"density": 0.02, "tiers": ["0.005=0.5", "0.02=0.5"]},
        "training": {"cls-only": True},
    },
}


def _runs(folder: Path, size: str, changes: dict[str, Any], device: str) -> dict[str, Any]:
    # Here, so that the other sections need neither Flower nor `datasets`.
    from fedpet.client.node_config import NodeConfig
    from fedpet.run.callbacks import Callback
    from fedpet.run.federate import federate, prepare
    from fedpet.run.local_grid import LocalGrid
    from fedpet.run.run_folder import new_run_folder

    results, values = {}, {}
    for number, where in enumerate(("cpu", device, device)):
        out = folder / f"out-{size}-{len(list(folder.iterdir()))}"
        tables: dict[str, dict[str, Any]] = {
            "run": {"name": "check", "out": str(out), "device": where, "cache": str(folder / "c")},
            "backbone": {"model": str(folder / size)},
            "data": {"source": str(folder / "rows"), "max-length": 32},
            "clients": {"client-column": "client", "min-rows": 2},
            "mask": {"density": 0.02},
            "training": {"learning-rate": 0.002, "batch-size": 8, "threads": 4},
            "strategy": {"num-rounds": 3, "clients-per-round": 4},
        }
        for stage, keys in changes.items():
            tables.setdefault(stage, {}).update(keys)
        experiment = Experiment.from_tables(tables)
        grid = LocalGrid.of(NodeConfig.from_experiment(experiment), 1)
        result = federate(
            grid, prepare(experiment, Callback()), new_run_folder(experiment), Callback()
        )
        key = f"{where} {number}"
        results[key] = {
            "hash": result["final_values_sha256"][:16],
            "by_round": [round(one["value"], 4) for one in result["quality"]["by_round"]],
            "refused": len(result["refused"]),
            "rounds_seconds": round(result["time"]["rounds_seconds"], 3),
            "training_seconds": round(result["time"]["local_training_seconds"], 3),
        }
        values[key] = np.load(out / "checkpoint" / "values.npy")
    first, second, third = values.values()
    return {
        "runs": results,
        "largest difference from the processor's": float(np.abs(first - second).max()),
        "relative (norms)": float(np.linalg.norm(first - second) / np.linalg.norm(first)),
        "two runs there are the same to the bit": bool(np.array_equal(second, third)),
    }


def _write_rows(folder: Path) -> None:
    folder.mkdir()
    generator = np.random.default_rng(7)
    for split, count in (("train", 128), ("test", 64)):
        lines = []
        for index in range(count):
            label = int(generator.integers(2))
            words = [
                WORDS[label],
                *generator.choice(WORDS[2:], size=int(generator.integers(3, 20))),
            ]
            row = {"text": " ".join(words), "label": label, "client": f"client {index % 8}"}
            lines.append(json.dumps(row))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_folder(folder: Path, size: str) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: index for index, word in enumerate(specials + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    random_model(size, len(vocabulary)).bert.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    ).save_pretrained(folder)
