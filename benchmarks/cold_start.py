"""Measure a device's cost of a message apart from training, and its peak memory.

    python -m benchmarks.cold_start [--repeats 5] [--out FILE]

Flower runs each message in a new process. Measured, each in a process of its own and in turns, so
that all see the same machine:

    bare       imports torch and transformers, builds the model, loads its weights; no more
    cold       a train message of the default job in `flwr-clientapp`: imports, plan, rows from the
               cache, checkpoint, mask, model, values in and out. No local step.
    warm       a second message to the same process, as in a simulation's worker. Flower 1.41 ends
               a ClientApp process after one message.

and for memory one epoch of one client: `fedpet`, full fine-tuning, LoRA of `peft`. Wall and
processor seconds are medians; memory is the largest resident set.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.peak_memory import peak_bytes

EXPERIMENT = Path(__file__).parents[1] / "simulations" / "experiments" / "film-reviews.toml"
KINDS = ("bare", "cold", "fedpet", "full", "peft-lora")
CHILD_SECONDS = 900.0


def main() -> None:
    """Measure, print, and write the file of --out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the measurement to this JSON file")
    parser.add_argument("--child", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(CHILDREN[arguments.child](arguments.folder)))
        return
    found = measure(arguments.repeats)
    show(found)
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def measure(repeats: int) -> dict[str, Any]:
    """Run every kind so many times, in turns."""
    from fedpet.run.run_folder import machine, versions

    with tempfile.TemporaryDirectory(prefix="fedpet-cold-") as name:
        folder = Path(name)
        _prepare(folder)
        _child("cold", folder)  # the files of all kinds are in the page cache from here on
        runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
        for _ in range(repeats):
            for kind in KINDS:
                runs[kind].append(_child(kind, folder))
    medians = {
        kind: {key: statistics.median(run[key] for run in done) for key in done[0]}
        for kind, done in runs.items()
    }
    bare, cold = medians["bare"], medians["cold"]
    return {
        "repeats": repeats,
        "medians": medians,
        "cold_to_bare_wall": cold["wall_seconds"] / bare["wall_seconds"],
        "cold_to_bare_processor": cold["processor_seconds"] / bare["processor_seconds"],
        "environment_mb": _environment_mb(),
        "runs": runs,
        "versions": versions(),
        "machine": machine(),
    }


def _environment_mb() -> float:
    """All that is installed where this runs, Ray and the developers' tools among it."""
    folder = Path(sysconfig.get_paths()["purelib"])
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def show(found: dict[str, Any]) -> None:
    """Print the medians as a table."""
    print(f"{'':10} {'wall s':>8} {'processor s':>12} {'peak MiB':>9}")
    for kind, row in found["medians"].items():
        wall, processor = row["wall_seconds"], row["processor_seconds"]
        print(f"{kind:10} {wall:8.2f} {processor:12.2f} {row['peak_mib']:9.0f}")
    print(f"{'warm':10} {found['medians']['cold']['warm_seconds']:8.2f}")
    ratios = found["cold_to_bare_wall"], found["cold_to_bare_processor"]
    print(f"cold / bare: {ratios[0]:.2f} of wall time, {ratios[1]:.2f} of processor time")


def _child(kind: str, folder: Path) -> dict[str, float]:
    """Run one process; its wall time is from its start to its end, as a device sees it."""
    command = [sys.executable, "-m", "benchmarks.cold_start", "--child", kind]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    done = subprocess.run(
        [*command, "--folder", str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=CHILD_SECONDS,
        check=False,
    )
    wall_seconds = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"{kind} failed:\n{done.stderr[-3000:]}")
    said: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {"wall_seconds": wall_seconds - said.get("warm_seconds", 0.0), **said}


def _used() -> dict[str, float]:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "peak_mib": peak_bytes() / 2**20,
    }


# -- the children ----------------------------------------------------------------------------------


def _experiment(folder: Path, epochs: int = 1) -> Any:
    from fedpet.config import Experiment

    overrides = [f"run.cache='{folder}/cache'", f"training.local-epochs={epochs}"]
    return Experiment.from_file(EXPERIMENT, overrides)


def _prepare(folder: Path) -> None:
    """Tokenise the rows, settle the plans, write requests to one client, of the median size."""
    from fedpet.backbone.pretrained import locate
    from fedpet.pet.layout import quantisation_groups
    from fedpet.protocol.plan import Plan
    from fedpet.run.callbacks import Callback
    from fedpet.run.federate import Prepared, prepare

    for epochs in (0, 1):
        experiment = _experiment(folder, epochs)
        prepared = prepare(experiment, Callback())
        assert isinstance(prepared, Prepared), "no search comes before it"
        plan = prepared.plan
        by_size = sorted(prepared.data.clients, key=lambda client: len(client.rows))
        client = by_size[len(by_size) // 2]
        plans = folder / "cache" / "plans"
        plans.mkdir(parents=True, exist_ok=True)
        digest = Plan.digest(plan.to_bytes())
        (plans / f"{digest.hex()}.plan").write_bytes(plan.to_bytes())
        for server_round in (1, 2):
            request = _request(
                plan, quantisation_groups(prepared.pet.segments), client.id, server_round
            )
            (folder / f"request-{epochs}-{server_round}").write_bytes(request)
    (folder / "rows.json").write_text(json.dumps(client.rows.tolist()), encoding="utf-8")
    (folder / "checkpoint").write_text(str(locate(experiment.backbone)), encoding="utf-8")


def _request(plan: Any, groups: list[tuple[int, int]], client: str, server_round: int) -> bytes:
    """Ask one client to train from the checkpoint."""
    import numpy as np

    from fedpet.codec import encode_values
    from fedpet.protocol.frame import Frame, pack_frame
    from fedpet.protocol.request import Request, write_request
    from fedpet.utils.seeds import client_id64, derive_seed

    values = np.zeros(plan.num_values, dtype=np.float32)
    seed = derive_seed("downlink", plan.seed, server_round)
    payload = encode_values(values, plan.codec.downlink, groups, seed=seed)
    digest = plan.digest(plan.to_bytes())
    frame = Frame(
        digest, server_round, 0, plan.codec.downlink, plan.num_values, 0, 0.0, 0.0, payload
    )
    return write_request(Request((client_id64(client),), pack_frame(frame)))


def bare(folder: Path) -> dict[str, float]:
    """Do the work that every client must."""
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.set_num_threads(1)
    place = (folder / "checkpoint").read_text(encoding="utf-8")
    AutoModelForSequenceClassification.from_pretrained(place, num_labels=2, dtype=torch.float32)
    return _used()


def cold(folder: Path) -> dict[str, float]:
    """Answer a train message in a new process, without a local step; then a second in the same."""
    answer = _client(folder)
    answer((folder / "request-0-1").read_bytes())
    used = _used()
    started = time.perf_counter()
    answer((folder / "request-0-2").read_bytes())
    return {**used, "warm_seconds": time.perf_counter() - started}


def fedpet(folder: Path) -> dict[str, float]:
    """Answer a train message in a new process, with its epoch."""
    _client(folder)((folder / "request-1-1").read_bytes())
    return _used()


def _client(folder: Path) -> Callable[[bytes], bytes]:
    """Load the modules that `flwr-clientapp` loads for a message."""
    import flwr.supernode.cli.flwr_clientapp

    import fedpet.client.flower_client
    from fedpet.client.node import Node
    from fedpet.client.node_config import NodeConfig
    from fedpet.protocol.frame import Frame, unpack_frames

    assert callable(flwr.supernode.cli.flwr_clientapp)
    assert fedpet.client.flower_client.make_client_app()
    node = Node(NodeConfig.from_experiment(_experiment(folder)))

    def answer(request: bytes) -> bytes:
        packed = node.answer(request)
        [frame] = unpack_frames(packed, max_frames=1, max_payload_bytes=len(packed))
        if not isinstance(frame, Frame):
            raise RuntimeError(str(frame))
        return packed

    return answer


def full(folder: Path) -> dict[str, float]:
    """Train every parameter on the same client."""
    return _train_whole(folder, lora=False)


def peft_lora(folder: Path) -> dict[str, float]:
    """Train LoRA of peft on the same client, on query and value."""
    return _train_whole(folder, lora=True)


def _train_whole(folder: Path, *, lora: bool) -> dict[str, float]:
    import numpy as np
    import torch

    from fedpet.backbone.pretrained import load_backbone, locate
    from fedpet.client.node_config import cache_folder
    from fedpet.data import load_data
    from fedpet.training.loop import train_rows

    experiment = _experiment(folder)
    data = load_data(
        experiment.data,
        experiment.clients,
        locate(experiment.backbone),
        cache=cache_folder(experiment),
        evaluation=False,
    )
    model: Any = load_backbone(experiment.backbone, num_outputs=data.task.num_outputs).model
    torch.set_num_threads(1)
    if lora:
        from peft import LoraConfig, TaskType, get_peft_model

        model = get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_CLS, r=8, lora_alpha=16))
    else:
        model.requires_grad_(True)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rows = np.asarray(json.loads((folder / "rows.json").read_text(encoding="utf-8")))
    train_rows(model, {"all": trainable}, data.train, rows, data.task, experiment.training, seed=0)
    return _used()


CHILDREN = {
    "bare": bare,
    "cold": cold,
    "fedpet": fedpet,
    "full": full,
    "peft-lora": peft_lora,
}


if __name__ == "__main__":
    main()
