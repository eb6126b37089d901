"""Measure a node whose worker stays beside one of Flower's own way: a process for each message.

    python -m benchmarks.warm_node [--rounds 6] [--rows 64] [--node-venv DIR] [--out FILE]

Three nodes on the loopback with the default job's model, the same rows and rounds for both ways.
Of each, from the run's first message to its end:

    a message        processor seconds of all processes of a node, over the messages it answered
    in the worker    of the worker alone, from the message to its answer; medians of train messages
    peak memory      largest sum of the resident sets of a node's processes, sampled
    a round          seconds by the clock, median of those after the first

and the processor seconds of the training alone, in this process, on a node's rows. The final values
must be the same bits. `--node-venv` names an environment as nodes have it, of
`pip install server/app`, for the nodes alone: this one's may hold pandas, pyarrow and more, which
transformers imports where they are installed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.deploy_demo import EXPERIMENT, NODES, write_thirds
from benchmarks.real_nodes import RealNodes, descendants, loopback_deployment
from fedpet.config import Experiment
from fedpet.deploy import write_deployment

WAYS = {"cold": "subprocess", "warm": "process"}
RUN_SECONDS = 1800.0
_TICKS, _PAGE = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
_ANSWERED = re.compile(r"answered a train message in [\d.]+ s, ([\d.]+) s of processor")


class Sampler(threading.Thread):
    """Sample the processes of a node: their processor seconds, and their memory together."""

    def __init__(self, root: int) -> None:
        super().__init__(daemon=True)
        self._root = root
        self._stopped = threading.Event()
        self.peak_bytes = 0
        self.most_processes = 0
        self._seconds: dict[tuple[int, str], float] = {}  # of each process that was seen

    def run(self) -> None:
        """Sample until `stop`."""
        while not self._stopped.wait(0.1):
            resident = 0
            born = {self._root: "root", **descendants(self._root)}
            for pid, started in born.items():
                try:
                    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                    resident += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
                except OSError:
                    continue  # it has ended
                self._seconds[pid, started] = (int(fields[11]) + int(fields[12])) / _TICKS
            self.peak_bytes = max(self.peak_bytes, resident)
            self.most_processes = max(self.most_processes, len(born))

    @property
    def seconds(self) -> float:
        """Processor seconds of all processes so far; of one that ended up to the last sample."""
        return sum(self._seconds.values())

    def stop(self) -> None:
        """End the sampling."""
        self._stopped.set()
        self.join()


def measure(rounds: int, rows: int, node_venv: str = "") -> dict[str, Any]:
    """Measure both ways."""
    found: dict[str, Any] = {"rounds": rounds, "rows": rows}
    with tempfile.TemporaryDirectory(prefix="fedpet-warm-") as folder:
        experiment = Experiment.from_file(
            EXPERIMENT,
            [
                f"strategy.num-rounds={rounds}",
                f"strategy.evaluate-every={rounds}",
                "strategy.clients-per-round=3",
                "data.max-eval-rows=64",
                f"run.cache='{folder}/cache'",
            ],
        )
        for way, isolation in WAYS.items():
            found[way] = measure_way(experiment, isolation, rows, Path(folder) / way, node_venv)
        found["training_cpu_seconds"] = training_alone(experiment, Path(folder) / "warm")
    hashes = {found[way].pop("final_values_sha256") for way in WAYS}
    if len(hashes) != 1:
        raise RuntimeError(f"the two ways end with other values: {hashes}")
    return {**found, "final_values_sha256": hashes.pop()}


def measure_way(
    experiment: Experiment, isolation: str, rows: int, folder: Path, node_venv: str
) -> dict[str, Any]:
    """Run three nodes of one kind."""
    own: dict[str, Any] = {"FEDPET_VENV": node_venv} if node_venv else {}
    deployment = loopback_deployment(experiment, NODES, isolation=isolation)
    write_deployment(deployment, folder)
    write_thirds(folder / "nodes", experiment)
    for name in NODES:
        path = folder / "nodes" / name / "data.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines()[:rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with RealNodes(folder, deployment.port) as real:
        real.start_server()
        real.register()
        samplers = {name: Sampler(real.start_node(name, **own).pid) for name in NODES}
        for sampler in samplers.values():
            sampler.start()
        time.sleep(20.0)  # until they have started
        before = {name: sampler.seconds for name, sampler in samplers.items()}
        done = real.run(limit_seconds=RUN_SECONDS)
        if done.returncode:
            raise RuntimeError((done.stdout + done.stderr)[-3000:])
        used = [sampler.seconds - before[name] for name, sampler in samplers.items()]
        for sampler in samplers.values():
            sampler.stop()
        result = real.result(f"{experiment.run.name}-1")
        later = [line for line in real.rounds(f"{experiment.run.name}-1") if line["round"] > 1]
        answered = [float(s) for name in NODES for s in _ANSWERED.findall(real.log(name))]
    messages = experiment.strategy.num_rounds + 1  # and the registration
    return {
        "cpu_seconds_per_message": statistics.median(used) / messages,
        "worker_cpu_seconds": statistics.median(answered[3:]) if answered else None,
        "peak_mib": max(sampler.peak_bytes for sampler in samplers.values()) / 2**20,
        "processes": max(sampler.most_processes for sampler in samplers.values()),
        "round_seconds": statistics.median(line["round_seconds"] for line in later),
        "local_training_seconds": result["time"]["local_training_seconds"] / messages,
        "final_values_sha256": result["final_values_sha256"],
    }


def training_alone(experiment: Experiment, folder: Path) -> float:
    """Return the processor seconds of a client's epoch on a node's rows, median of five."""
    import torch

    from fedpet.client.model_cache import ModelCache
    from fedpet.client.node_config import NodeConfig
    from fedpet.client.plan_store import PlanStore
    from fedpet.protocol.plan import Plan
    from fedpet.training.loop import train_rows

    run = next((folder / "server" / "runs").iterdir())
    plan = Plan.from_bytes((run / "plan.bin").read_bytes())
    place = folder / "nodes" / NODES[0]
    server = replace(experiment, clients=replace(experiment.clients, partition="nodes"))
    config = NodeConfig.from_experiment(
        server,
        {"data": str(place / "data.jsonl"), "client": NODES[0], "cache": str(folder / "again")},
    )
    plans = PlanStore(config.cache)
    digest = Plan.digest(plan.to_bytes())
    plans.put(plan.to_bytes(), digest)
    loaded = ModelCache(config, plans).load(digest)
    torch.set_num_threads(plan.training.threads)
    [client_rows] = loaded.rows_of.values()
    pet: Any = loaded.pet
    seconds = []
    for seed in range(5):
        started = time.process_time()
        train_rows(
            pet.model,
            pet.parameter_groups(),
            loaded.data.train,
            client_rows,
            plan.task,
            plan.training,
            seed=seed,
            factor=plan.rate_factor(1),
            after_step=pet.after_step,
            sent=pet.sent_values(),
        )
        seconds.append(time.process_time() - started)
    return statistics.median(seconds)


def show(found: dict[str, Any]) -> None:
    """Print the table."""
    print("| | a message, processor s | in the worker | peak MiB | processes | a round, s |")
    print("|---|---:|---:|---:|---:|---:|")
    for way in WAYS:
        one = found[way]
        worker = "" if one["worker_cpu_seconds"] is None else f"{one['worker_cpu_seconds']:.2f}"
        print(
            f"| {way} | {one['cpu_seconds_per_message']:.2f} | {worker} | {one['peak_mib']:.0f} "
            f"| {one['processes']} | {one['round_seconds']:.1f} |"
        )
    training = found["training_cpu_seconds"]
    print(f"training alone: {training:.2f} processor s; bound {1.3 * training + 0.5:.2f}")
    print(f"values: {found['final_values_sha256'][:16]}, both ways")


def main() -> None:
    """Measure, print, and write the file of --out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--node-venv", default="", help="the nodes' environment; else this one")
    parser.add_argument("--out", type=Path, help="write the measurement to this JSON file")
    arguments = parser.parse_args()
    found = measure(arguments.rounds, arguments.rows, arguments.node_venv)
    show(found)
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
