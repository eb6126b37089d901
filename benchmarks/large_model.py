"""Run one federated round of a model of a billion parameters, and measure memory and seconds.

    python -m benchmarks.large_model --out large_model.json

In:  the sizes of a Llama, whose bfloat16 weights are random and are written to a temporary folder;
     two clients of one step each, a worker for each.
Out: by stage, seconds and the peak of memory as a multiple of the checkpoint's size: of a mask, of
     a round with its final model, of a merge. Of the round it is that of all processes together,
     each page counted once (the kernel's PSS), with the share of each at that moment.

Linux only. Other processes on the machine share its cores: the seconds are walls.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.peak_memory import peak_bytes
from fedpet.backbone.module_roles import maskable_weights
from fedpet.backbone.pretrained import load_backbone
from fedpet.client.node import get_node
from fedpet.client.node_config import NodeConfig
from fedpet.config import BackboneConfig, Experiment, MaskConfig
from fedpet.export.saved_run import merge_run
from fedpet.pet.mask import build_mask
from fedpet.protocol.flower_compat.flower_simulation import quiet_flower
from fedpet.run.callbacks import Callback
from fedpet.run.federate import federate
from fedpet.run.local_grid import LocalGrid
from fedpet.run.prepare import prepare
from fedpet.run.ray_engine import simulate
from fedpet.run.run_folder import machine, new_run_folder, versions

WORDS = ["good", "bad", "film", "plot", "cast", "score", "fine", "dull", "the", "is", "very", "not"]
CLIENTS, ROWS = 2, 4
DENSITY = 0.005


def write_checkpoint(folder: Path, width: int, layers: int) -> None:
    """Write a random Llama without a head in bfloat16, and a tokeniser of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

    heads = max(width // 64, 1)
    config = LlamaConfig(
        hidden_size=width, num_hidden_layers=layers, intermediate_size=width * 11 // 4,
        num_attention_heads=heads, num_key_value_heads=max(heads // 8, 1), vocab_size=width * 16,
        pad_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        model: Any = LlamaModel(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.data.fill_(1.0) if "norm" in name else parameter.data.normal_(std=0.02)
    model.save_pretrained(folder)
    words = {word: index for index, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]"
    ).save_pretrained(folder)


def write_rows(folder: Path) -> None:
    """Write short texts of each client, and as many for the evaluation."""
    folder.mkdir()
    for split in ("train", "test"):
        rows = [
            {"text": " ".join(WORDS[n % 2 : 8 + n % 3]), "label": n % 2, "client": f"{n % CLIENTS}"}
            for n in range(CLIENTS * ROWS)
        ]
        text = "\n".join(json.dumps(row) for row in rows)
        (folder / f"{split}.jsonl").write_text(text + "\n", encoding="utf-8")


def mask_peak(checkpoint: str) -> dict[str, float]:
    """Load a checkpoint and build its mask; seconds, and bytes above those with torch imported."""
    _import_all()
    before, started = peak_bytes(), time.perf_counter()
    backbone = load_backbone(BackboneConfig(model=checkpoint, dtype="bfloat16"), num_outputs=2)
    loaded = time.perf_counter()
    scope = maskable_weights(backbone.model, backbone.head)
    build_mask(scope, MaskConfig(density=DENSITY))
    return {
        "load_seconds": loaded - started,
        "seconds": time.perf_counter() - loaded,
        "peak": peak_bytes() - before,
    }


def _import_all() -> None:
    """Import what a checkpoint is read with, so that it does not count."""
    from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification

    assert all((AutoModelForSequenceClassification, LlamaForSequenceClassification))


def merge_peak(run: str, out: str) -> dict[str, float]:
    """Fold a run's values into its checkpoint and write it; as `mask_peak`."""
    _import_all()
    before, started = peak_bytes(), time.perf_counter()
    merge_run(Path(run), Path(out))
    return {"seconds": time.perf_counter() - started, "peak": peak_bytes() - before}


class Clock(Callback):
    """Notes when each stage of a run began."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, float]] = []

    def on_stage(self, what: str) -> None:
        """Note it."""
        self.stages.append((what, time.perf_counter()))

    def on_round_end(self, record: Any, ledger: Any) -> None:
        """Note it."""
        self.stages.append((f"after round {record.round}", time.perf_counter()))


class PssSampler:
    """The largest PSS of this process and its descendants, and who held it."""

    def __init__(self) -> None:
        self.peak: dict[str, int] = {}
        self.largest_worker = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Sample five times a second within the context."""
        over = threading.Event()
        thread = threading.Thread(target=self._sample, args=(over,), daemon=True)
        thread.start()
        yield
        over.set()
        thread.join()

    def _sample(self, over: threading.Event) -> None:
        while not over.wait(0.2):
            held = {"server": 0, "workers": 0, "ray": 0}
            for pid, name in _family().items():
                with suppress(OSError):  # it has ended
                    pss = _pss(pid)
                    is_worker = name.startswith("ray::") or "spawn_main" in name
                    role = "workers" if is_worker else "ray"
                    held["server" if pid == "self" else role] += pss
                    if role == "workers":
                        self.largest_worker = max(self.largest_worker, pss)
            if sum(held.values()) > sum(self.peak.values()):
                self.peak = held


def _family() -> dict[str, str]:
    """Name this process, "self", and its descendants, by pid."""
    parents, names = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                stat = (folder / "stat").read_text(encoding="utf-8", errors="replace")
                parents[folder.name] = stat.rpartition(")")[2].split()[1]
                names[folder.name] = (folder / "cmdline").read_text(encoding="utf-8")
    own = Path("/proc/self").resolve().name
    family = {own}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return {"self" if pid == own else pid: names.get(pid, "") for pid in family}


def _pss(pid: str) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def simulate_in_processes(experiment: Experiment, callback: Callback) -> dict[str, Any]:
    """Run an experiment on a plain process a worker, one after the other."""
    config = NodeConfig.from_experiment(experiment)
    with ExitStack() as stack:
        stack.enter_context(quiet_flower())
        make = multiprocessing.get_context("spawn").Pool
        pools = [stack.enter_context(make(1)) for _ in range(experiment.run.workers)]
        grid = LocalGrid({n + 1: partial(_answer_in, pool, config) for n, pool in enumerate(pools)})
        prepared = prepare(experiment, callback)
        return federate(grid, prepared, new_run_folder(experiment), callback)


def _answer_in(pool: Any, config: NodeConfig, payload: bytes) -> bytes:
    reply: bytes = pool.apply(answer, (payload, config))
    return reply


def answer(payload: bytes, config: NodeConfig) -> bytes:
    """Answer a message as this process's node."""
    return get_node(config).answer(payload)


def run_round(
    checkpoint: Path, rows: Path, out: Path, *, shared: bool, on_ray: bool
) -> dict[str, Any]:
    """Prepare, train one round, write the plain model; memory and seconds by stage."""
    experiment = Experiment.from_tables(
        {
            "run": {"out": str(out), "workers": CLIENTS, "cache": str(out.parent / "cache")},
            "backbone": {"model": str(checkpoint), "dtype": "bfloat16", "shared": shared},
            "data": {"source": str(rows), "max-length": 16},
            "clients": {"client-column": "client", "min-rows": 1},
            "mask": {"density": DENSITY},
            "structure": {"preset": "lnfit"},
            "training": {"batch-size": ROWS, "gradient-checkpointing": True},
            "strategy": {"num-rounds": 1, "clients-per-round": CLIENTS},
        }
    )
    sampler, clock = PssSampler(), Clock()
    with sampler.running():
        if on_ray:
            result, _ = simulate(experiment, clock)
        else:
            result = simulate_in_processes(experiment, clock)
    ends = [when for _, when in clock.stages[1:]] + [time.perf_counter()]
    return {
        "seconds": result["time"]["total_seconds"],
        "stages": [
            [name, round(end - start, 1)]
            for (name, start), end in zip(clock.stages, ends, strict=True)
        ],
        "parameters": result["model"]["backbone_parameters"],
        "values": result["model"]["communicated_values"],
        "peak": sum(sampler.peak.values()),
        "at_the_peak": sampler.peak,
        "largest_worker": sampler.largest_worker,
        "final_values_sha256": result["final_values_sha256"],
    }


def _in_a_process(function: Any, *arguments: Any) -> Any:
    """Call it in a process of its own, which has held nothing before."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.large_model")
    parser.add_argument("--out", default="large_model.json", help="the JSON file to write")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--no-ray", action="store_true", help="workers are plain processes")
    parser.add_argument("--own", action="store_true", help="a round without shared weights as well")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fedpet-large-") as place:
        folder = Path(place)
        checkpoint, rows = folder / "checkpoint", folder / "rows"
        _in_a_process(write_checkpoint, checkpoint, options.width, options.layers)
        write_rows(rows)
        size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
        found: dict[str, Any] = {"checkpoint_bytes": size, "density": DENSITY, "clients": CLIENTS}
        found["workers"] = "processes" if options.no_ray else "Ray"
        found["mask"] = _in_a_process(mask_peak, str(checkpoint))
        found["round"] = run_round(
            checkpoint, rows, folder / "run", shared=True, on_ray=not options.no_ray
        )
        found["merge"] = _in_a_process(merge_peak, str(folder / "run"), str(folder / "merged"))
        if options.own:
            found["round_own"] = run_round(
                checkpoint, rows, folder / "own", shared=False, on_ray=not options.no_ray
            )
    for stage in ("mask", "merge", "round", "round_own"):
        if stage in found:
            found[stage]["peak_over_checkpoint"] = round(found[stage]["peak"] / size, 3)
            print(f"{stage:10} {found[stage]}")
    found |= {"versions": versions(), "machine": machine()}
    Path(options.out).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
