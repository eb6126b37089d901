"""Run any method's rounds in this process, by fedpet's own messages, codecs and books.

    experiment, method -> one model -> Node on a LocalGrid <-> SparseStrategy -> result

Server and node share the model, which each sets to the values it needs before it uses it. No model
is written and no journal kept: a cell of a table is run again if it is cut short.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from flwr.app import ArrayRecord, MetricRecord

from benchmarks.baselines import METHODS, Baseline
from benchmarks.baselines.one_vector import BaselineVector
from benchmarks.dense_rounds import run_dense, stays_here
from benchmarks.gradient_mask import gradient_mask
from fedpet.backbone.device import check_device
from fedpet.backbone.module_roles import find_target_modules
from fedpet.backbone.pretrained import Backbone, load_for_task, locate
from fedpet.client.model_cache import LoadedPlan
from fedpet.client.node import Node
from fedpet.client.node_config import NodeConfig, make_cache
from fedpet.codec import check_codecs
from fedpet.config import Experiment
from fedpet.data import FederatedData, load_data
from fedpet.errors import ConfigError, RunError, TrainingError
from fedpet.pet.layout import layout_hash
from fedpet.pet.model import PetModel
from fedpet.pet.structure import Structure, load_structure
from fedpet.pet.tiers import tiers_of
from fedpet.protocol.ledger import TRAINING, Ledger, RoundRecord
from fedpet.protocol.plan import Plan, encode_mask
from fedpet.run.local_grid import LocalGrid
from fedpet.run.result import count_by_kind, summarise
from fedpet.server.aggregation import from_arrays, to_arrays
from fedpet.server.client_pool import ClientPool
from fedpet.server.rounds import SparseStrategy
from fedpet.training.evaluation import assess_rows
from fedpet.training.input_checks import settle_padding
from fedpet.training.loop import count_examples
from fedpet.training.metrics import Assessment
from fedpet.utils.seeds import client_id64

__all__ = ["FAILED", "FEDPET", "GRADIENT", "RUNS", "DivergedError", "diverged", "run_here"]

FEDPET = "fedpet"
GRADIENT = "gradient-mask"  # fedpet with a mask by the gradient of one batch
RUNS = (FEDPET, GRADIENT, *METHODS)


FAILED = "nothing learned"
LOWER = "lower training.learning-rate"  # what a client's refusal advises whose training diverged


class DivergedError(RunError):
    """Raised where no round came to an average since training diverged on every client."""


def diverged(method: str, seed: int, error: DivergedError) -> dict[str, Any]:
    """Return the result of a run whose training diverged: there is no score."""
    return {
        "run": {"method": method, "seed": seed, "status": FAILED},
        "why": str(error),
        "time": {"processor_seconds": 0.0},
    }


@dataclass(frozen=True)
class _OneModel:
    """Stand in for a node's `ModelCache`: the model is at hand."""

    loaded: LoadedPlan

    def load(self, digest: bytes) -> LoadedPlan:
        assert digest == self.loaded.digest
        return self.loaded


def run_here(experiment: Experiment, runs: str, also: Sequence[str] = ()) -> dict[str, Any]:
    """Run a method, one thread, and return what `result.json` holds, shortened.

    Args:
        experiment: Clients, rows, rounds, rates, codec, device; what is trained where fedpet is
            run.
        runs: Of `RUNS`.
        also: Further splits to evaluate the start and the final values on.

    Returns:
        As `fedpet.run.result.summarise`, without rows and classes, with "curve": of each evaluated
        round its number, the metric, and the bytes up to its end; with "also": the metric at the
        start and at the end by split; and with the seconds of processor time.

    Raises:
        DivergedError: Every client's training diverged in every round.
        RunError: No round came to an average for another reason.
        InputError: The experiment, the checkpoint or the data cannot be used.
    """
    if runs not in RUNS:
        raise ConfigError(f"unknown method {runs!r}. Known are: {', '.join(RUNS)}.")
    started, clock = time.perf_counter(), time.process_time()
    experiment = experiment.located()
    check_codecs(experiment.codec)
    torch.set_num_threads(experiment.training.threads)
    data = load_data(
        experiment.data,
        experiment.clients,
        locate(experiment.backbone),
        cache=make_cache(experiment),
    )
    device = check_device(experiment.run.device)
    if device == "cuda":
        # Of all methods alike: three times as fast on such a card, at about bfloat16's precision.
        torch.set_float32_matmul_precision("high")
    backbone = load_for_task(experiment.backbone, data.task, device=device)
    settle_padding(backbone.model, data.train)
    about = backbone.fingerprint, backbone.pretrained_parameters, backbone.origin
    plan, model = _plan_and_model(experiment, runs, backbone, data)
    digest = Plan.digest(plan.to_bytes())
    rows_of = {client_id64(client.id): client.rows for client in data.clients}
    ledger = Ledger()
    population = ClientPool(count_examples(data, data.task), homes={})
    reckoned = False
    if isinstance(model, BaselineVector) and stays_here(experiment, model):
        reckoned = True
        dtype = experiment.run.evaluation_dtype
        found: list[Assessment] = []

        def evaluate() -> float:
            found.append(assess_rows(model.model, data.evaluation, data.task, dtype=dtype))
            return found[-1].value

        try:
            values = run_dense(experiment, plan, model, data, population, ledger, evaluate)
        except TrainingError as error:
            raise DivergedError(str(error)) from None
        final = found[-1]
    else:
        strategy = SparseStrategy(
            plan=plan,
            tiers=tiers_of(model, plan.mask),
            population=population,
            config=experiment.strategy,
            ledger=ledger,
        )
        with tempfile.TemporaryDirectory(prefix="fedpet-cell-") as folder:
            config = replace(NodeConfig.from_experiment(experiment), cache=Path(folder))
            node = Node(config)
            pet = cast(PetModel, model)
            node.models = cast(Any, _OneModel(LoadedPlan(digest, plan, pet, data, rows_of)))
            values, final = _rounds(experiment, plan, model, data, strategy, node, ledger)
    others = {split: _start_and_end(experiment, split, plan, model, values) for split in also}
    result = summarise(
        experiment,
        method=runs,
        ledger=ledger,
        data=data,
        fingerprint=about[0],
        plan_digest=digest.hex(),
        values_by_kind=count_by_kind(model.segments),
        inexact_kinds=model.inexact_kinds,
        pretrained_parameters=about[1],
        values_sha256=hashlib.sha256(values.astype("<f4").tobytes()).hexdigest(),
        final=final,
        total_seconds=time.perf_counter() - started,
        origin=about[2],
        training=plan.training if runs in (FEDPET, GRADIENT) else None,
    )
    result["curve"] = curve(ledger.of_kind(TRAINING))
    if others:
        result["also"] = others
    if reckoned:
        result["communication"]["reckoned"] = True  # four bytes a value: see dense_rounds.py
    if device == "cuda":
        result["machine"] = {"gpu": torch.cuda.get_device_name(), "products": "tf32"}
        result["machine"]["peak_bytes"] = torch.cuda.max_memory_allocated()
    result["time"] = {"processor_seconds": time.process_time() - clock}
    for key in ("versions", "machine"):  # a cell's file says these itself
        del result["run"][key]
    for stage, keys in (("data", ("classes", "rows")), ("model", ("origin",))):
        for key in keys:
            del result[stage][key]
    for key in ("by_class", "by_client", "predicted", "by_round", "loss_by_round"):
        result["quality"].pop(key, None)
    plain: dict[str, Any] = json.loads(json.dumps(result))
    return plain


def _start_and_end(
    experiment: Experiment,
    split: str,
    plan: Plan,
    model: PetModel | BaselineVector,
    values: np.ndarray,
) -> dict[str, float]:
    """Return the metric on another split before the first round and after the last."""
    rows = load_data(
        replace(experiment.data, eval_split=split),
        experiment.clients,
        locate(experiment.backbone),
        cache=make_cache(experiment),
    )
    found = {}
    for name, delta in (("initial", np.zeros_like(values)), ("final", values)):
        model.set_delta(torch.from_numpy(delta.copy()), seed=plan.seed)
        dtype = experiment.run.evaluation_dtype
        found[name] = assess_rows(model.model, rows.evaluation, rows.task, dtype=dtype).value
    return found


def curve(rounds: Sequence[RoundRecord]) -> list[list[float]]:
    """Return of each evaluated round: its number, the metric, all bytes up to its end."""
    found: list[list[float]] = []
    sent = 0
    for record in rounds:
        sent += record.uplink_bytes + record.downlink_bytes + record.plan_bytes
        if record.metric is not None:
            found.append([record.round, record.metric, sent])
    return found


def _plan_and_model(
    experiment: Experiment, runs: str, backbone: Backbone, data: FederatedData
) -> tuple[Plan, PetModel | BaselineVector]:
    """Make a plan and the model of it; a baseline's plan names its vector's layout alone."""
    if runs == FEDPET:
        positions = find_target_modules(backbone.model, backbone.head)
        structure = load_structure(experiment.structure, positions)
        return Plan.for_training(experiment, backbone, structure, data.task, data.tokenizer_hash)
    bare = replace(experiment, mask=replace(experiment.mask, enabled=False))
    plan, head_alone = Plan.for_training(
        bare, backbone, Structure(), data.task, data.tokenizer_hash
    )
    head_alone.unload()
    model: PetModel | BaselineVector
    coded = b""
    if runs == GRADIENT:
        mask = gradient_mask(backbone, data, experiment.mask.density, experiment.run.seed)
        model, coded = PetModel(backbone, mask, Structure(), seed=plan.seed), encode_mask(mask)
    else:
        model = BaselineVector(Baseline(runs, experiment, data))
    layout = layout_hash(model.tiers)
    plan = replace(plan, num_values=model.num_values, layout=layout, mask_positions=coded)
    return plan, model


def _rounds(
    experiment: Experiment,
    plan: Plan,
    model: PetModel | BaselineVector,
    data: FederatedData,
    strategy: SparseStrategy,
    node: Node,
    ledger: Ledger,
) -> tuple[np.ndarray, Assessment]:
    """Run the rounds; return the final values, float32, (num_values,), and their assessment."""
    settings, dtype = experiment.strategy, experiment.run.evaluation_dtype
    assessed: list[Assessment] = []

    def round_over(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        record = ledger.begin(0) if server_round == 0 else ledger.current
        if server_round % settings.evaluate_every == 0 or server_round == settings.num_rounds:
            model.set_delta(torch.from_numpy(from_arrays(arrays).copy()), seed=plan.seed)
            assessed.append(assess_rows(model.model, data.evaluation, data.task, dtype=dtype))
            record.metric = assessed[-1].value
        ledger.close()
        return None

    result = strategy.start(
        LocalGrid({1: node.answer}),
        to_arrays(np.zeros(plan.num_values, np.float32)),
        num_rounds=settings.num_rounds,
        timeout=settings.round_deadline_seconds,
        evaluate_fn=round_over,
    )
    if not any(record.aggregated for record in ledger.rounds):
        reasons = {refused["reason"] for record in ledger.rounds for refused in record.refused}
        kind = DivergedError if all(LOWER in reason for reason in reasons) else RunError
        raise kind(f"no round came to an average: {'; '.join(sorted(reasons))}")
    return from_arrays(result.arrays), assessed[-1]
