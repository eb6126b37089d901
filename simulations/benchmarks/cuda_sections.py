"""What `cuda_check` looks at, a function a section: correctness first, then time and memory.

Models are BERTs with random weights in MiniLM's and BERT-base's sizes: laws, time and memory do not
depend on what a checkpoint has learned, and none has to be there.
"""

from __future__ import annotations

import copy
import functools
import gc
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedpet.backbone import Backbone
from fedpet.config import Experiment, MaskConfig
from fedpet.first_token import first_token_only
from fedpet.mask import Mask, build_mask
from fedpet.model import PetModel
from fedpet.positions import find_positions, mask_scope
from fedpet.structure import preset

ROOT = Path(__file__).resolve().parents[2]
# layers, width, inner width, heads
SIZES = {"tiny": (2, 32, 64, 2), "minilm": (6, 384, 1536, 12), "bert-base": (12, 768, 3072, 12)}
VOCABULARY = 30522
WORDS = ["good", "bad", "fine", "dull", "film", "plot", "cast", "score", "the", "of", "and", "is"]


@dataclass(frozen=True)
class Place:
    """Where a section looks, how long, and what takes its findings."""

    device: str
    tiny: bool
    finish: float  # on `time.monotonic`'s clock
    found: Callable[[str, Any], None]

    def left(self) -> float:
        """Seconds."""
        return self.finish - time.monotonic()

    def synchronise(self) -> None:
        """Wait for what was launched."""
        if self.device == "cuda":
            torch.cuda.synchronize()


@contextmanager
def _said(place: Place, name: str) -> Iterator[None]:
    """One part of a section: what it raises is a finding, and the others go on."""
    import traceback

    try:
        yield
    except Exception:
        place.found(name, {"error": traceback.format_exc()[-3000:]})
        gc.collect()


# -- models -----------------------------------------------------------------------------------


@functools.cache
def _random(size: str, vocabulary: int) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    layers, width, inner, heads = SIZES[size]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
    )
    model = BertForSequenceClassification(config).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def _backbone(size: str, device: str, vocabulary: int = VOCABULARY) -> Backbone:
    """A fresh copy of the size's one random model, frozen, on the device."""
    model = copy.deepcopy(_random(size, vocabulary)).to(device)
    head = tuple(name for name, _ in model.named_parameters() if name.startswith("classifier"))
    return Backbone(size, Path("."), model, head, "0" * 64)


@functools.cache
def _mask(size: str, density: float, vocabulary: int = VOCABULARY) -> Mask:
    model = _random(size, vocabulary)
    head = [name for name, _ in model.named_parameters() if name.startswith("classifier")]
    return build_mask(mask_scope(model, head), MaskConfig(density=density))


def _pet(base: Backbone, mask: Mask | None, names: str) -> PetModel:
    positions = find_positions(base.model, base.head)
    return PetModel(base, mask, preset(names, positions, rank=8, scale=2.0), seed=3)


def _batch(
    rows: int, tokens: int, device: str, vocabulary: int
) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, vocabulary, (rows, tokens), generator=generator)
    attention = torch.ones_like(ids)
    attention[-1, tokens // 2 :] = 0
    labels = torch.randint(0, 2, (rows,), generator=generator)
    inputs = {"input_ids": ids.to(device), "attention_mask": attention.to(device)}
    return inputs, labels.to(device)


# -- sections: is it right? -------------------------------------------------------------------


def environment(place: Place) -> None:
    """What is on the machine."""
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
        with _said(place, "nvidia-smi"):
            asked = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=20)
            place.found("nvidia-smi", asked.stdout[-2500:])


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
        with _said(place, f"{size}: masks"):
            moved = _backbone(size, place.device, vocabulary)
            same = {}
            for granularity in ("global", "per-tensor"):
                for rule in ("smallest", "largest", "random"):
                    config = MaskConfig(density=0.01, rule=rule, granularity=granularity)
                    here = _backbone(size, "cpu", vocabulary)
                    one = build_mask(mask_scope(here.model, here.head), config)
                    other = build_mask(mask_scope(moved.model, moved.head), config)
                    same[f"{rule}, {granularity}"] = one.digest() == other.digest()
            place.found(f"{size}: masks are the same to the bit", same)
            bad += [f"{size}: mask of {name}" for name, equal in same.items() if not equal]
        for name, (density, names) in LAWS.items():
            if place.left() < 3:
                bad.append(f"{size}: {name} was not looked at, for want of time")
                continue
            with _said(place, f"{size}: {name}"):
                row = _law(size, density, names, place.device, vocabulary)
                place.found(f"{size}: {name}", row)
                bad += [
                    f"{size}: {name}: {what}" for what, holds in row["holds"].items() if not holds
                ]
    place.found("laws that do not hold", bad)


def _law(size: str, density: float, names: str, device: str, vocabulary: int) -> dict[str, Any]:
    mask = _mask(size, density, vocabulary) if density else None
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
    before = _random(size, vocabulary).state_dict()
    base = _backbone(size, device, vocabulary)
    pet = _pet(base, mask, names)
    inputs, labels = _batch(8, 24, device, vocabulary)
    start = 0.01 * torch.randn(pet.num_values, generator=torch.Generator().manual_seed(1))
    pet.load_values(start, seed=5)
    back = bool(torch.equal(pet.values(), start))
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
    found["values"] = pet.values()
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
    """The tests that ask for a GPU."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pytest", "tests/test_device.py", "-q", "-rfE"]
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
    place.found("said", (done.stdout + done.stderr)[-5000:])
    if done.returncode:
        raise RuntimeError("tests failed, or were not found")


def _path() -> list[str]:
    return [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]


class _Silent:
    def say(self, text: str) -> None: ...
    def round_done(self, record: object, ledger: object) -> None: ...


def run(place: Place) -> None:
    """A whole federation in this process, there twice and on the processor."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_rows(folder / "rows")
        for size in ("tiny",) if place.tiny else ("tiny", "minilm"):
            _write_folder(folder / size, size)
            for title, changes in RUNS.items():
                if place.left() < 10:
                    place.found(f"{size}: {title}", "left out for want of time")
                    continue
                with _said(place, f"{size}: {title}"):
                    place.found(f"{size}: {title}", _runs(folder, size, changes, place.device))


RUNS: dict[str, dict[str, dict[str, Any]]] = {
    "mask and lora, eden-3": {
        "structure": {"preset": "lnfit+lora", "rank": 4},
        "codec": {"up": "eden-3", "down": "eden-5", "downlink": "values"},
    },
    "first token, tiers": {
        "structure": {"preset": "lnfit"},
        "mask": {"density": 0.02, "tiers": ["0.005=0.5", "0.02=0.5"]},
        "training": {"first-token-only": True},
    },
}


def _runs(folder: Path, size: str, changes: dict[str, Any], device: str) -> dict[str, Any]:
    # Here, so that the other sections need neither Flower nor `datasets`.
    from fedpet.node_settings import NodeSettings
    from fedpet.simulations.federation import federate, prepare
    from fedpet.simulations.local_grid import LocalGrid
    from fedpet.simulations.run_folder import new_run_folder

    results, values = {}, {}
    for number, where in enumerate(("cpu", device, device)):
        out = folder / f"out-{size}-{len(list(folder.iterdir()))}"
        tables: dict[str, dict[str, Any]] = {
            "run": {"name": "check", "out": str(out), "device": where, "cache": str(folder / "c")},
            "backbone": {"model": str(folder / size)},
            "data": {"source": str(folder / "rows"), "max-length": 32},
            "population": {"client-column": "client", "min-rows": 2},
            "mask": {"density": 0.02},
            "training": {"learning-rate": 0.002, "batch-size": 8, "threads": 4},
            "strategy": {"num-rounds": 3, "clients-per-round": 4},
        }
        for stage, keys in changes.items():
            tables.setdefault(stage, {}).update(keys)
        experiment = Experiment.from_tables(tables)
        grid = LocalGrid.of(NodeSettings.of(experiment), 1)
        result = federate(
            grid, prepare(experiment, _Silent()), new_run_folder(experiment), _Silent()
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
    _random(size, len(vocabulary)).bert.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    ).save_pretrained(folder)


# -- sections: what does it cost? -------------------------------------------------------------

Step = Callable[[], None]
FIRST_TOKEN = ", first token"


def _fedpet(base: Backbone, density: float, names: str = "none") -> tuple[Any, Any, Step, Step]:
    pet = _pet(base, _mask(base.source, density) if density else None, names)
    return pet.model, list(pet.parameter_groups().values()), pet.zero_grad, pet.after_step


def _plain(base: Backbone, trains: Callable[[str], bool]) -> tuple[Any, Any, Step, Step]:
    for name, parameter in base.model.named_parameters():
        parameter.requires_grad_(trains(name) or name in base.head)
    return _by_torch(base.model)


def _peft_lora(base: Backbone) -> tuple[Any, Any, Step, Step]:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=["query", "value"], modules_to_save=["classifier"]
    )
    return _by_torch(get_peft_model(base.model, config).eval())


def _by_torch(model: Any) -> tuple[Any, Any, Step, Step]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def zero() -> None:
        for parameter in parameters:
            parameter.grad = None

    return model, parameters, zero, lambda: None


METHODS: dict[str, Callable[[Backbone], tuple[Any, Any, Step, Step]]] = {
    "mask-0.5%": lambda base: _fedpet(base, 0.005),
    "full": lambda base: _plain(base, lambda name: True),
    "bitfit (torch)": lambda base: _plain(base, lambda name: name.endswith("bias")),
    "mask-0.5%" + FIRST_TOKEN: lambda base: _fedpet(base, 0.005),
    "peft-lora": _peft_lora,
    "default: mask-0.1%, lora-factors+lnfit" + FIRST_TOKEN: lambda base: _fedpet(
        base, 0.001, "lora-factors+lnfit"
    ),
    "mask-0.1%": lambda base: _fedpet(base, 0.001),
    "mask-5%": lambda base: _fedpet(base, 0.05),
    "lora": lambda base: _fedpet(base, 0.0, "lora"),
    "bitfit": lambda base: _fedpet(base, 0.0, "bitfit"),
    "mask-2%": lambda base: _fedpet(base, 0.02),
}
SETTINGS = (
    ("minilm", 32, 32),
    ("bert-base", 32, 128),
    ("minilm", 16, 128),
    ("bert-base", 8, 128),
)
WARM = 6
LEAST_STEPS, MOST_STEPS = 8, 80


@dataclass
class Stepper:
    """One method on one model: takes steps."""

    place: Place
    method: str
    base: Backbone
    inputs: dict[str, Tensor]
    labels: Tensor
    autocast: bool = False

    def __post_init__(self) -> None:
        made = METHODS[self.method](self.base)
        self.model, self.parameters, self.zero, self.after = made
        self.optimiser = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)
        self._passes = ExitStack()
        if FIRST_TOKEN in self.method:
            self._passes.enter_context(first_token_only(self.model, self.inputs))

    def forward(self) -> Tensor:
        """The loss."""
        cast = torch.autocast(self.place.device, torch.bfloat16) if self.autocast else nullcontext()
        with cast:
            logits = self.model(**self.inputs).logits
        return nn.functional.cross_entropy(logits.float(), self.labels)

    def step(self) -> None:
        """A whole one."""
        self.zero()
        self.forward().backward()
        self.optimiser.step()
        self.after()

    def close(self) -> None:
        """Let go of it all."""
        self._passes.close()


def _timed(place: Place, work: Callable[[], Any], seconds: float) -> list[float]:
    """Wall seconds of repeated calls, each waited for."""
    times: list[float] = []
    finish = time.monotonic() + seconds
    while len(times) < LEAST_STEPS or (time.monotonic() < finish and len(times) < MOST_STEPS):
        place.synchronise()
        started = time.perf_counter()
        work()
        place.synchronise()
        times.append(time.perf_counter() - started)
    return times


def _stepper(place: Place, method: str, size: str, rows: int, tokens: int, **more: Any) -> Stepper:
    base = _backbone(size, place.device)
    return Stepper(place, method, base, *_batch(rows, tokens, place.device, VOCABULARY), **more)


def _measured(place: Place, stepper: Stepper, before: int, seconds: float) -> dict[str, Any]:
    for _ in range(1 if place.tiny else WARM):
        stepper.step()
    row: dict[str, Any] = {"values": sum(p.numel() for p in stepper.parameters)}
    if place.device == "cuda":
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        stepper.step()
        torch.cuda.synchronize()
        row["held_MB"] = round((held - before) / 1e6, 2)
        row["step_peak_MB"] = round((torch.cuda.max_memory_allocated() - held) / 1e6, 2)
        row["peak_MB"] = round(torch.cuda.max_memory_allocated() / 1e6, 2)
    times = _timed(place, stepper.step, seconds)
    row["step_ms"] = round(1e3 * statistics.median(times), 3)
    row["least_ms"] = round(1e3 * min(times), 3)
    row["steps"] = len(times)
    if place.device == "cuda":  # not waited for each: what a loop without prints reaches
        started = time.perf_counter()
        for _ in range(20):
            stepper.step()
        launched = time.perf_counter() - started
        torch.cuda.synchronize()
        row["in_a_row_ms"] = round(50 * (time.perf_counter() - started), 3)
        row["launched_ms"] = round(50 * launched, 3)  # by Python, whatever the GPU still has to do
    return row


def _clear(place: Place) -> int:
    """Give memory back; bytes that are still held."""
    gc.collect()
    if place.device != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def _cell(
    place: Place, name: str, size: str, rows: int, tokens: int, method: str, **more: Any
) -> None:
    with _said(place, name):
        before = _clear(place)
        stepper = _stepper(place, method, size, rows, tokens, **more)
        size_bytes = sum(p.nbytes for p in _random(size, VOCABULARY).parameters())
        row = _measured(place, stepper, before + size_bytes, 0.05 if place.tiny else 1.0)
        stepper.close()
        del stepper
        place.found(name, row)


def steps(place: Place) -> None:
    """A training step's time and memory, by method."""
    settings: Iterable[tuple[str, int, int]] = SETTINGS
    if place.tiny:
        settings = [("tiny", 4, 16)]
    for size, rows, tokens in settings:
        for method in METHODS:
            if place.left() < 8:
                place.found("left out for want of time", f"{size} {rows}x{tokens} {method} and on")
                return
            _cell(place, f"{size} {rows}x{tokens} {method}", size, rows, tokens, method)


def precision(place: Place) -> None:
    """The same with bfloat16 passes, and with TF32 products."""
    size, rows, tokens = ("tiny", 4, 16) if place.tiny else ("bert-base", 32, 128)
    methods = ("mask-0.5%", "full", "peft-lora", "bitfit (torch)")
    for kind in ("bfloat16", "tf32"):
        torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
        for method in methods:
            if place.left() < 6:
                return
            name = f"{size} {rows}x{tokens} {method}, {kind}"
            _cell(place, name, size, rows, tokens, method, autocast=kind == "bfloat16")


def profile(place: Place) -> None:
    """Where a fedpet step's time goes."""
    from torch.profiler import ProfilerActivity

    cuda = place.device == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    settings = [("tiny", 4, 16)] if place.tiny else [("minilm", 32, 32), ("bert-base", 32, 128)]
    for size, rows, tokens in settings:
        for method in ("mask-0.5%", "bitfit (torch)", "full"):
            name = f"{size} {rows}x{tokens} {method}"
            if place.left() < 6:
                return
            with _said(place, name):
                _clear(place)
                stepper = _stepper(place, method, size, rows, tokens)
                for _ in range(WARM):
                    stepper.step()
                place.found(f"{name}: parts", _parts(place, stepper))
                count = 10
                place.synchronise()
                with torch.profiler.profile(activities=activities) as seen:
                    for _ in range(count):
                        stepper.step()
                    place.synchronise()
                place.found(f"{name}: profile", _tops(seen.key_averages(), count))


def _parts(place: Place, stepper: Stepper) -> dict[str, float]:
    """Milliseconds of a step's parts, each waited for: the median of 15."""
    times: dict[str, list[float]] = {}

    def part(name: str, work: Callable[[], Any]) -> Any:
        place.synchronise()
        started = time.perf_counter()
        result = work()
        launched = time.perf_counter()
        place.synchronise()
        times.setdefault(name, []).append(time.perf_counter() - started)
        times.setdefault(f"{name}, launched", []).append(launched - started)
        return result

    for _ in range(15):
        part("zero", stepper.zero)
        loss = part("forward", stepper.forward)
        part("backward", loss.backward)
        part("optimiser", stepper.optimiser.step)
        part("after", stepper.after)
    return {name: round(1e3 * statistics.median(all_), 4) for name, all_ in times.items()}


def _tops(events: Any, steps: int, most: int = 18) -> dict[str, Any]:
    def rows(key: str) -> list[dict[str, Any]]:
        ordered = sorted(events, key=lambda event: -getattr(event, key))[:most]
        return [
            {
                "name": event.key[:90],
                "us_a_step": round(getattr(event, key) / steps, 1),
                "calls_a_step": round(event.count / steps, 1),
            }
            for event in ordered
            if getattr(event, key)
        ]

    launches = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
    waits = ("cudaStreamSynchronize", "cudaMemcpyAsync", "cudaDeviceSynchronize", "cudaMalloc")
    counts = {event.key: round(event.count / steps, 1) for event in events}
    return {
        "gpu_us_a_step": round(sum(event.self_device_time_total for event in events) / steps, 1),
        "cpu_us_a_step": round(sum(event.self_cpu_time_total for event in events) / steps, 1),
        "launches_a_step": {key: counts[key] for key in launches if key in counts},
        "waits_a_step": {key: counts[key] for key in waits if key in counts},
        "by_gpu": rows("self_device_time_total"),
        "by_cpu": rows("self_cpu_time_total"),
    }


def sampled(place: Place) -> None:
    """The weight's gradient at the mask's positions: sampled, dense, and other ways."""
    shapes = [(1024, 384, 1536), (2048, 768, 3072), (4096, 768, 3072), (2048, 768, 768)]
    if place.tiny:
        shapes = [(64, 32, 48)]
    for tokens, inner, outer in shapes:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(tokens, inner, generator=generator).to(place.device)
        g = torch.randn(tokens, outer, generator=generator).to(place.device)
        for density in (0.001, 0.005, 0.01, 0.02, 0.05):
            name = f"{tokens} tokens, {inner}->{outer}, {100 * density:g} %"
            if place.left() < 5:
                return
            with _said(place, name):
                place.found(name, _sampled(place, x, g, density))


def _sampled(place: Place, x: Tensor, g: Tensor, density: float) -> dict[str, Any]:
    rows, columns = g.shape[1], x.shape[1]
    count = max(int(density * rows * columns), 1)
    generator = torch.Generator().manual_seed(2)
    flat = torch.randperm(rows * columns, generator=generator)[:count].sort().values
    row, column = flat // columns, flat % columns
    crow = torch.zeros(rows + 1, dtype=torch.int64)
    crow[1:] = torch.bincount(row, minlength=rows).cumsum(0)
    flat, row, column = (tensor.to(place.device) for tensor in (flat, row, column))
    pattern = torch.sparse_csr_tensor(
        crow.to(place.device, torch.int32),
        column.to(torch.int32),
        torch.zeros(count, device=place.device),
        (rows, columns),
    )
    left, right = g.t().contiguous(), x.t().contiguous()
    expected = (g.t() @ x).flatten()[flat]
    scale = float(expected.abs().max())
    ways: dict[str, Callable[[], Tensor]] = {
        "sampled_addmm": lambda: torch.sparse.sampled_addmm(
            pattern, left, right.t(), beta=0.0
        ).values(),
        "sampled_addmm with transposes": lambda: torch.sparse.sampled_addmm(
            pattern, g.t().contiguous(), x.t().contiguous().t(), beta=0.0
        ).values(),
        "dense": lambda: g.t() @ x,
        "dense, then chosen": lambda: (g.t() @ x).view(-1)[flat],
    }
    if count * len(x) < 3e8:
        ways["rows chosen, multiplied, summed"] = lambda: (left[row] * right[column]).sum(1)
    found: dict[str, Any] = {"values": count}
    for name, way in ways.items():
        for _ in range(3):
            result = way()
        times = _timed(place, way, 0.15)
        found[name] = {"ms": round(1e3 * statistics.median(times), 4)}
        started = time.perf_counter()
        for _ in range(20):
            way()
        place.synchronise()
        found[name]["in_a_row_ms"] = round(50 * (time.perf_counter() - started), 4)
        if name != "dense":
            found[name]["error"] = float(f"{float((result - expected).abs().max()) / scale:.1e}")
    return found


def rotation_there(place: Place) -> None:
    """The codec's rotation by torch, and by numpy on the processor: the same bits, and time."""
    from fedpet.codec import rotation

    for count in (1000,) if place.tiny else (90_000, 4_096 * 24, 8_000_000):
        with _said(place, f"{count} values"):
            values = np.random.default_rng(0).standard_normal(count).astype(np.float32)
            expected = rotation.rotate(values, np.random.PCG64(5))
            there = torch.from_numpy(values).to(place.device)
            signs = _signs(count, place.device)
            found = _rotate(there, *signs)
            numpy = [0.0] * 5
            for index in range(5):
                started = time.perf_counter()
                rotation.rotate(values, np.random.PCG64(5))
                numpy[index] = time.perf_counter() - started
            row: dict[str, Any] = {
                "the same bits": bool(np.array_equal(found.cpu().numpy(), expected)),
                "numpy_ms": round(1e3 * statistics.median(numpy), 3),
            }
            ways: dict[str, Callable[[], Any]] = {
                "there_ms": functools.partial(_rotate, there, *signs),
                "signs drawn and moved, result fetched_ms": functools.partial(
                    _rotate_and_fetch, there, place.device
                ),
            }
            for name, way in ways.items():
                row[name] = round(1e3 * statistics.median(_timed(place, way, 0.5)), 3)
            place.found(f"{count} values", row)


def _rotate_and_fetch(values: Tensor, device: str) -> Tensor:
    return _rotate(values, *_signs(len(values), device)).cpu()


def _signs(count: int, device: str) -> list[Tensor]:
    """Of both rounds, as factors: (2, windows, C), and of the last, overlapping window."""
    from fedpet.codec import rotation

    size = rotation.window_size(count)
    drawn = rotation._draw_signs(count, size, np.random.PCG64(5))
    places = torch.arange(8, dtype=torch.uint8, device=device)
    factors = []
    for packed in drawn:
        moved = torch.from_numpy(np.ascontiguousarray(packed)).to(device)
        bits = (moved.unsqueeze(-1) >> places) & 1
        factors.append(1.0 - 2.0 * bits.flatten(-2).float())
    return factors


def _rotate(values: Tensor, signs: Tensor, last: Tensor) -> Tensor:
    size = signs.shape[-1]
    whole = len(values) // size * size
    out = values.clone()
    out[:whole] = _twice(out[:whole].view(-1, size), signs).flatten()
    if whole < len(values):
        out[-size:] = _twice(out[-size:].view(1, size), last).flatten()
    return out


def _twice(windows: Tensor, signs: Tensor) -> Tensor:
    size = windows.shape[1]
    rows = 1 << (size.bit_length() - 1) // 2
    for factors in signs:
        windows = _hadamard(windows * factors, rows)
    return windows * (1 / size)


def _hadamard(slab: Tensor, rows: int) -> Tensor:
    windows, size = slab.shape
    slab = _butterflies(slab, rows)
    slab = slab.view(windows, rows, size // rows).transpose(1, 2).reshape(windows, size)
    return _butterflies(slab, size // rows)


def _butterflies(slab: Tensor, rows: int) -> Tensor:
    windows, size = slab.shape
    step = size // rows
    while step < size:
        first, second = slab.view(windows, -1, 2, step).unbind(2)
        slab = torch.stack((first + second, first - second), 2).view(windows, size)
        step *= 2
    return slab


SECTIONS: dict[str, Callable[[Place], None]] = {
    "environment": environment,
    "laws": laws,
    "suite": suite,
    "run": run,
    "steps": steps,
    "profile": profile,
    "sampled": sampled,
    "precision": precision,
    "rotation": rotation_there,
}
