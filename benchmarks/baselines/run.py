"""Run a baseline on an experiment of fedpet's: full fine-tuning, peft's LoRA, or the head alone.

It leaves the same `config.toml`, `rounds.jsonl` and `result.json`, and no model. As in fedpet's run
are the checkpoint and start of the head, rows and clients, the clients drawn each round, the order
of a client's batches, the local training loop, rounds and evaluation. Its own are the trained
tensors and their messages. Trainable tensors go as an ordinary ArrayRecord,
one array a tensor, in one message a client, and `flwr.serverapp.strategy.FedAvg` averages them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import tomli_w
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from benchmarks.baselines.client import reply
from benchmarks.baselines.ledger import DenseLedger
from benchmarks.baselines.methods import Baseline
from benchmarks.baselines.rounds import DenseFedAvg
from fedpet.backbone.pretrained import locate
from fedpet.client.node_config import cache_folder
from fedpet.config import Experiment
from fedpet.data import FederatedData, load_data
from fedpet.errors import ConfigError, RunError
from fedpet.run.callbacks import Callback
from fedpet.run.quality import refuse_diverged
from fedpet.run.ray_engine import run_on_ray
from fedpet.run.result import summarise
from fedpet.run.run_folder import RunFolder, new_run_folder
from fedpet.server.client_pool import ClientPool
from fedpet.training.evaluation import assess_rows
from fedpet.training.metrics import Assessment
from fedpet.utils.cores import usable_cores


@dataclass(frozen=True)
class PreparedBaseline:
    """Hold rows, clients and the server's model, ready before the first message."""

    method: str
    experiment: Experiment
    data: FederatedData
    baseline: Baseline
    started: float  # on `time.perf_counter`'s clock


def prepare_baseline(method: str, experiment: Experiment, callback: Callback) -> PreparedBaseline:
    """Read the rows and load the model.

    Raises:
        InputError: The method, the experiment, the checkpoint or the data cannot be used.
    """
    started = time.perf_counter()
    if experiment.strategy.name != "fedavg":
        raise ConfigError(
            f"a baseline is averaged by Flower's FedAvg, and strategy.name is "
            f"{experiment.strategy.name!r}: leave it at 'fedavg'."
        )
    if experiment.training.has_auto_rates:
        raise ConfigError(
            "training.learning-rate = 'auto' is derived from fedpet's model, and a baseline has "
            "another: give a number."
        )
    callback.on_stage("reading and tokenising the rows")
    data = load_data(
        experiment.data,
        experiment.clients,
        locate(experiment.backbone),
        cache=cache_folder(experiment),
    )
    callback.on_stage(f"loading the backbone {experiment.backbone.model!r}")
    return PreparedBaseline(method, experiment, data, Baseline(method, experiment, data), started)


def run_baseline(
    method: str, experiment: Experiment, callback: Callback
) -> tuple[dict[str, Any], RunFolder]:
    """Run one baseline on Ray, as `fedpet.run.ray_engine.simulate` runs fedpet.

    Returns:
        What `result.json` holds, and the run folder.

    Raises:
        InputError: The experiment, the checkpoint or the data cannot be used.
        RunError: Ray does not start, or no round came to an average.
    """
    prepared = prepare_baseline(method, experiment, callback)
    out = new_run_folder(experiment)
    client_app = ClientApp()

    @client_app.train()
    def train(message: Message, context: Context) -> Message:
        return reply(message, method, experiment)

    callback.on_stage(f"starting Ray with {experiment.run.workers} workers")
    result = run_on_ray(
        experiment,
        lambda: client_app,
        lambda grid: federate_baseline(grid, prepared, out, callback),
    )
    return result, out


def federate_baseline(
    grid: Grid, prepared: PreparedBaseline, out: RunFolder, callback: Callback
) -> dict[str, Any]:
    """Run the rounds on any Grid, step by step as `fedpet.run.federate.federate`.

    Raises:
        RunError: No round came to an average, or the final model's outputs are not finite.
    """
    method, experiment = prepared.method, prepared.experiment
    data, baseline = prepared.data, prepared.baseline
    torch.set_num_threads(usable_cores())  # the server evaluates while the nodes are idle
    (out.path / "config.toml").write_text(tomli_w.dumps(experiment.to_tables()), encoding="utf-8")
    ledger = DenseLedger(out.path / "rounds.jsonl")
    population = ClientPool({c.id: len(c.rows) for c in data.clients}, homes={})
    strategy = DenseFedAvg(experiment, population, ledger)
    settings = experiment.strategy
    assessed: list[Assessment] = []

    def evaluate_arrays(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        record = ledger.begin(0) if server_round == 0 else ledger.current
        if server_round % settings.evaluate_every == 0 or server_round == settings.num_rounds:
            clock = time.perf_counter()
            baseline.load(arrays)
            cache, dtype = cache_folder(experiment), experiment.run.evaluation_dtype
            assessed.append(
                assess_rows(baseline.model, data.evaluation, data.task, cache=cache, dtype=dtype)
            )
            record.metric = assessed[-1].value
            record.evaluation_seconds = time.perf_counter() - clock
        ledger.close()
        callback.on_round_end(record, ledger)
        return None if record.metric is None else MetricRecord({data.task.metric: record.metric})

    callback.on_stage("starting the rounds")
    result = strategy.start(
        grid,
        baseline.arrays(),
        num_rounds=settings.num_rounds,
        timeout=settings.round_deadline_seconds,
        evaluate_fn=evaluate_arrays,
    )
    assert ledger.current.metric is not None, "the last round is always evaluated"
    learned = any(record.aggregated for record in ledger.rounds)
    if learned:
        baseline.load(result.arrays)
    summary = summarise(
        experiment,
        method=method,
        ledger=ledger,
        data=data,
        fingerprint=baseline.fingerprint,
        plan_digest="",
        values_by_kind=baseline.values_by_kind(),
        pretrained_parameters=baseline.pretrained_parameters,
        values_sha256=baseline.values_sha256(),
        final=assessed[-1],
        total_seconds=time.perf_counter() - prepared.started,
        origin=baseline.origin,
    )
    summary["run"]["codec"] = "float32 arrays"  # as Flower sends them
    out.write_result(summary)
    if not learned:
        raise RunError(
            f"no client gave a usable reply in any round, so nothing was learned; "
            f"{out.path / 'rounds.jsonl'} says why."
        )
    refuse_diverged(summary)
    return summary
