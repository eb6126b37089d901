"""What a Flower user does without fedpet: full fine-tuning, peft's LoRA, and the head alone.

    backbone -> data -> [baseline] -> client -> Flower's FedAvg -> ledger -> result.json

In:  an experiment, the same that fedpet runs.
Out: the same `config.toml`, `rounds.jsonl` and `result.json`; no model.

The same as in fedpet's run: checkpoint and start of the head, rows and clients, the clients drawn
each round, the order of a client's batches, the local training loop, rounds, evaluation. Other
than there: what is trained, and how it travels. Trainable tensors go as an ordinary ArrayRecord,
one array a tensor, in one message a client, and `flwr.serverapp.strategy.FedAvg` averages them.

LoRA is peft's: rank 8, alpha 16, on the positions that peft itself names for the architecture
(query and value in BERT), its factors both trained, and the head by `modules_to_save`.
"""

from __future__ import annotations

import functools
import hashlib
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tomli_w
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.app.message import make_message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import Tensor, nn

from fedpet.backbone import Backbone, load_backbone, locate
from fedpet.config import Experiment
from fedpet.data import FederatedData, load_data
from fedpet.errors import BackboneError, ConfigError, FedpetError, RunError, TrainingError
from fedpet.ledger import Ledger
from fedpet.messages import solo_bytes, to_record, wire_bytes
from fedpet.node_settings import cache_folder
from fedpet.population import Population
from fedpet.seeds import client_number, derive_seed
from fedpet.simulations.engine import run_on_ray
from fedpet.simulations.federation import Listener
from fedpet.simulations.run_folder import RunFolder, new_run_folder
from fedpet.simulations.summary import summarise
from fedpet.strategies import Metered
from fedpet.training import evaluate, train_rows

LORA_RANK = 8
LORA_ALPHA = 16
CLIENT_FAILED = 1000  # Flower's error codes below are its own

Groups = dict[str, dict[str, nn.Parameter]]  # kind of module -> name -> what is trained


# -- what each baseline trains ---------------------------------------------------------------


def _full(backbone: Backbone, seed: int) -> tuple[nn.Module, Groups]:
    """Every parameter of the model."""
    named = dict(backbone.model.named_parameters())
    return backbone.model, {
        "full": {name: p for name, p in named.items() if name not in backbone.head},
        "head": {name: named[name] for name in backbone.head},
    }


def _peft_lora(backbone: Backbone, seed: int) -> tuple[nn.Module, Groups]:
    """LoRA as peft sets it up for a classifier; its down-projections drawn from `seed`."""
    try:
        from peft import LoraConfig, TaskType, get_peft_model
    except ImportError:
        raise ConfigError(
            "the LoRA baseline is peft's, which is not installed here: pip install 'fedpet[bench]'."
        ) from None
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=LORA_RANK,
        lora_alpha=LORA_ALPHA,
        modules_to_save=_head_modules(backbone),
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # peft asks transformers by a name that transformers 5.23 calls deprecated
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        torch.manual_seed(derive_seed("peft-lora", seed))
        try:
            model = get_peft_model(backbone.model, config)
        except ValueError as error:
            raise BackboneError(
                f"peft does not know where LoRA goes in {backbone.source!r}: {error}"
            ) from None
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return model, {
        "lora": {name: p for name, p in trained.items() if ".lora_" in name},
        "head": {name: p for name, p in trained.items() if ".lora_" not in name},
    }


def _head_only(backbone: Backbone, seed: int) -> tuple[nn.Module, Groups]:
    """The newly initialised parameters alone."""
    named = dict(backbone.model.named_parameters())
    return backbone.model, {"head": {name: named[name] for name in backbone.head}}


METHODS: Mapping[str, Callable[[Backbone, int], tuple[nn.Module, Groups]]] = {
    "full": _full,
    "peft-lora": _peft_lora,
    "head": _head_only,
}


def _head_modules(backbone: Backbone) -> list[str]:
    """Paths of the outermost modules that hold parameters of the head and no others."""
    found: list[str] = []
    for path, module in backbone.model.named_modules():
        names = [f"{path}.{name}" for name, _ in module.named_parameters()]
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if path and names and not inside and set(names) <= set(backbone.head):
            found.append(path)
    return found


class Baseline:
    """A model, and the tensors of it that one method trains and sends.

    Args:
        method: One of `METHODS`.
        experiment: Names the checkpoint, and seeds what is drawn.
        data: Its task decides the head.

    Attributes:
        model: Called with a batch.
        groups: Kind of module -> name -> parameter.
        tensors: The same without the kinds, in the order in which they are sent.
        fingerprint: Of the checkpoint.
        pretrained_parameters: Of the checkpoint, whether trained or not.
    """

    def __init__(self, method: str, experiment: Experiment, data: FederatedData) -> None:
        if method not in METHODS:
            raise ConfigError(f"unknown baseline {method!r}. Known are: {', '.join(METHODS)}.")
        backbone = load_backbone(
            experiment.backbone,
            num_outputs=data.task.num_outputs,
            regression=data.task.kind == "regression",
        )
        self.fingerprint = backbone.fingerprint
        self.pretrained_parameters = sum(
            p.numel() for name, p in backbone.model.named_parameters() if name not in backbone.head
        )
        self.model, self.groups = METHODS[method](backbone, experiment.run.seed)
        self.tensors: dict[str, nn.Parameter] = {}
        for group in self.groups.values():
            self.tensors |= group
        self.model.requires_grad_(False)
        for tensor in self.tensors.values():
            tensor.requires_grad_(True)
        self.model.eval()

    def arrays(self) -> ArrayRecord:
        """The trainable tensors, copied."""
        return ArrayRecord({name: Array(p.detach().numpy()) for name, p in self.tensors.items()})

    @torch.no_grad()
    def load(self, arrays: ArrayRecord) -> None:
        """Write the tensors of a message into the model."""
        for name, tensor in self.tensors.items():
            tensor.copy_(torch.from_numpy(arrays[name].numpy()))

    def values_by_kind(self) -> dict[str, int]:
        """Numbers that are sent, by kind."""
        return {
            kind: sum(tensor.numel() for tensor in group.values())
            for kind, group in self.groups.items()
        }


# -- the client --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Resident:
    """What stays in a process between messages."""

    baseline: Baseline
    data: FederatedData
    rows_of: Mapping[str, np.ndarray]  # client -> its rows


@functools.lru_cache(maxsize=1)
def _resident(method: str, experiment: Experiment) -> _Resident:
    data = load_data(
        experiment.data,
        experiment.population,
        locate(experiment.backbone),
        cache=cache_folder(experiment),
        evaluation=False,
    )
    rows_of = {client.id: client.rows for client in data.clients}
    return _Resident(Baseline(method, experiment, data), data, rows_of)


def reply(message: Message, method: str, experiment: Experiment) -> Message:
    """Train the client that a message names, from the tensors it brings."""
    client = str(message.content.config_records["config"]["client"])
    try:
        return Message(_train(message.content, client, method, experiment), reply_to=message)
    except FedpetError as error:
        return Message(Error(CLIENT_FAILED, str(error)), reply_to=message)


def _train(content: RecordDict, client: str, method: str, experiment: Experiment) -> RecordDict:
    resident = _resident(method, experiment)
    baseline, training = resident.baseline, experiment.training
    server_round = int(content.config_records["config"]["server-round"])  # type: ignore[arg-type]
    torch.set_num_threads(training.threads)
    baseline.load(content.array_records["arrays"])
    trained = train_rows(
        baseline.model,
        {kind: list(group.values()) for kind, group in baseline.groups.items()},
        resident.data.train,
        resident.rows_of[client],
        resident.data.task,
        training,
        seed=derive_seed("client", experiment.run.seed, server_round, client_number(client)),
        progress=(server_round - 1) / experiment.strategy.num_rounds,
    )
    if not all(_finite(tensor) for tensor in baseline.tensors.values()):
        raise TrainingError(
            "the trained values hold NaN or infinity: lower training.learning-rate."
        )
    metrics = MetricRecord(
        {
            "num-examples": trained.num_examples,
            "train-loss": trained.loss,
            "train-seconds": trained.train_seconds,
        }
    )
    return RecordDict({"arrays": baseline.arrays(), "metrics": metrics})


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


# -- the server --------------------------------------------------------------------------------


@dataclass
class DenseLedger(Ledger):
    """A ledger that weighs the arrays of one message a round and direction, not of every one.

    What a tensor weighs depends on its shape alone (two tensors of equal bytes in one message
    are one object to Flower and weigh once, as LoRA's up-projections do before the first round).
    Serialising and hashing each of a round's messages of 91 MB would take longer than some
    rounds' training, so the arrays of the first message down and of the first up stand for
    those of all others; everything else of a message is weighed on that message.
    """

    _arrays_bytes: dict[tuple[int, bool], int] = field(default_factory=dict)

    def count_wire(self, message: Message) -> None:
        """Count a message as it is sent or received."""
        if message.has_error():
            super().count_wire(message)
            return
        is_reply = bool(message.metadata.reply_to_message_id)
        envelope = make_message(message.metadata, content=to_record(b""))
        self.current.wire_bytes += wire_bytes(envelope) - _content_bytes(to_record(b""))
        self.current.wire_bytes += self.weigh(message.content, is_reply=is_reply)
        self.current.messages += 1

    def weigh_alone(self, content: RecordDict, *, is_reply: bool) -> int:
        """What a message with this content weighs to or from one device alone."""
        envelope = solo_bytes(b"", reply=is_reply) - _content_bytes(to_record(b""))
        return envelope + self.weigh(content, is_reply=is_reply)

    def weigh(self, content: RecordDict, *, is_reply: bool) -> int:
        """Bytes of a message's records, arrays and their headers included."""
        (arrays,) = content.array_records.values()
        key = (self.current.round, is_reply)
        if key not in self._arrays_bytes:
            # New Array objects over the same bytes: weighing leaves chunks in an object, which
            # would then travel a second time.
            copied = {
                name: Array(array.dtype, array.shape, array.stype, array.data)
                for name, array in arrays.items()
            }
            self._arrays_bytes[key] = wire_bytes(ArrayRecord(copied))  # type: ignore[arg-type]
        others = RecordDict(
            {
                name: ArrayRecord() if isinstance(record, ArrayRecord) else record
                for name, record in content.items()
            }
        )
        empty = wire_bytes(ArrayRecord())  # type: ignore[arg-type]
        return _content_bytes(others) - empty + self._arrays_bytes[key]


def _content_bytes(content: RecordDict) -> int:
    return wire_bytes(content)  # type: ignore[arg-type]


class _ClientRounds(FedAvg):
    """One message a client; the clients are those that fedpet draws."""

    def __init__(self, experiment: Experiment, population: Population, ledger: DenseLedger) -> None:
        super().__init__(min_available_nodes=1, min_train_nodes=1)
        self.experiment = experiment
        self.population = population
        self.ledger: Ledger = ledger
        self._weigh_alone = ledger.weigh_alone
        self._asked: list[tuple[str, Message]] = []

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message a client, to the node where fedpet would train it."""
        settings = self.experiment.strategy
        clients = self.population.sample(
            server_round, settings.clients_per_round, self.experiment.run.seed
        )
        cohorts = self.population.cohorts(clients, self._wait_for_nodes(grid))
        self._asked = []
        for node, cohort in cohorts.items():
            for client in cohort:
                told = ConfigRecord({"server-round": server_round, "client": client})
                content = RecordDict({"arrays": arrays, "config": told})
                message = Message(content, dst_node_id=node, message_type="train")
                self._asked.append((client, message))
                self.ledger.count_client(down=self._weigh_alone(content, is_reply=False))
        self.ledger.current.clients = len(clients)
        return [message for _, message in self._asked]

    def _wait_for_nodes(self, grid: Grid) -> list[int]:
        limit = time.monotonic() + self.experiment.strategy.node_wait_seconds
        while not (nodes := sorted(grid.get_node_ids())):
            if time.monotonic() > limit:
                raise RunError("no node came within strategy.node-wait-seconds.")
            time.sleep(0.1)
        return nodes

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Flower's average, over the replies in the order of the clients' names.

        The order of the sum is settled here so that the result does not depend on which worker
        was faster.
        """
        answers = {reply.metadata.reply_to_message_id: reply for reply in replies}
        record = self.ledger.current
        usable: list[Message] = []
        seconds: dict[int, float] = {}
        for client, message in sorted(self._asked, key=lambda asked: asked[0]):
            answer = answers.get(message.metadata.message_id)
            if answer is None:
                self.ledger.refuse(client, "no reply came before the round's deadline.")
            elif answer.has_error():
                self.ledger.refuse(client, answer.error.reason or "an unnamed error.")
            else:
                usable.append(answer)
                self.ledger.count_client(up=self._weigh_alone(answer.content, is_reply=True))
                node = message.metadata.dst_node_id
                (metrics,) = answer.content.metric_records.values()
                seconds[node] = seconds.get(node, 0.0) + float(metrics["train-seconds"])  # type: ignore[arg-type]
        self._asked = []
        averaged, metrics_of_all = super().aggregate_train(server_round, usable)
        for answer in usable:
            answer.content.clear()  # Flower's loop holds a round's replies through the next round
        record.replies = len(usable)
        record.train_seconds = max(seconds.values(), default=0.0)
        if metrics_of_all is not None:
            record.loss = float(metrics_of_all["train-loss"])  # type: ignore[arg-type]
        return averaged, metrics_of_all

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """No message: the server evaluates."""
        return []

    def summary(self) -> None:
        """Say nothing: the run's own progress does."""


class DenseFedAvg(Metered, _ClientRounds):
    """Flower's own FedAvg over tensors, a message a client, metered as fedpet's strategies are.

    Equality: the aggregate is `FedAvg.aggregate_train` of the same replies, to the bit, where
    those come in the order of the clients' names.
    """


@dataclass(frozen=True)
class PreparedBaseline:
    """What is settled before the first message: rows, clients, the server's model."""

    method: str
    experiment: Experiment
    data: FederatedData
    baseline: Baseline
    started: float  # on `time.perf_counter`'s clock


def prepare_baseline(method: str, experiment: Experiment, listener: Listener) -> PreparedBaseline:
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
    listener.say("reading and tokenising the rows")
    data = load_data(
        experiment.data,
        experiment.population,
        locate(experiment.backbone),
        cache=cache_folder(experiment),
    )
    listener.say(f"loading the backbone {experiment.backbone.model!r}")
    return PreparedBaseline(method, experiment, data, Baseline(method, experiment, data), started)


def run_baseline(
    method: str, experiment: Experiment, listener: Listener
) -> tuple[dict[str, Any], RunFolder]:
    """Run one baseline on Ray, as `fedpet.simulations.engine.simulate` runs fedpet.

    Returns:
        What `result.json` holds, and the run folder.

    Raises:
        InputError: The experiment, the checkpoint or the data cannot be used.
        RunError: Ray does not start, or no round came to an average.
    """
    prepared = prepare_baseline(method, experiment, listener)
    out = new_run_folder(experiment)
    client_app = ClientApp()

    @client_app.train()
    def train(message: Message, context: Context) -> Message:
        return reply(message, method, experiment)

    listener.say(f"starting Ray with {experiment.run.workers} workers")
    result = run_on_ray(
        experiment, client_app, lambda grid: federate_baseline(grid, prepared, out, listener)
    )
    return result, out


def federate_baseline(
    grid: Grid, prepared: PreparedBaseline, out: RunFolder, listener: Listener
) -> dict[str, Any]:
    """Run the rounds on any Grid, step by step as `fedpet.simulations.federation.federate`.

    Raises:
        RunError: No round came to an average.
    """
    method, experiment = prepared.method, prepared.experiment
    data, baseline = prepared.data, prepared.baseline
    torch.set_num_threads(os.cpu_count() or 1)  # the server evaluates while the nodes are idle
    (out.path / "config.toml").write_text(tomli_w.dumps(experiment.to_tables()), encoding="utf-8")
    ledger = DenseLedger(out.path / "rounds.jsonl")
    population = Population({c.id: len(c.rows) for c in data.clients}, homes={})
    strategy = DenseFedAvg(experiment, population, ledger)
    settings = experiment.strategy

    def evaluate_arrays(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        record = ledger.begin(0) if server_round == 0 else ledger.current
        if server_round % settings.evaluate_every == 0 or server_round == settings.num_rounds:
            clock = time.perf_counter()
            baseline.load(arrays)
            record.metric = evaluate(baseline.model, data.evaluation, data.task)
            record.evaluation_seconds = time.perf_counter() - clock
        ledger.close()
        listener.round_done(record, ledger)
        return None if record.metric is None else MetricRecord({data.task.metric: record.metric})

    listener.say("starting the rounds")
    result = strategy.start(
        grid,
        baseline.arrays(),
        num_rounds=settings.num_rounds,
        timeout=settings.round_deadline_seconds,
        evaluate_fn=evaluate_arrays,
    )
    final = ledger.current.metric
    assert final is not None, "the last round is always evaluated"
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
        values_sha256=_values_sha256(baseline),
        final=final,
        total_seconds=time.perf_counter() - prepared.started,
    )
    out.write_result(summary)
    if not learned:
        raise RunError(
            f"no client gave a usable reply in any round, so nothing was learned; "
            f"{out.path / 'rounds.jsonl'} says why."
        )
    return summary


def _values_sha256(baseline: Baseline) -> str:
    """SHA-256 of the trained tensors, float32, little-endian, in the order they are sent."""
    digest = hashlib.sha256()
    for tensor in baseline.tensors.values():
        digest.update(np.ascontiguousarray(tensor.detach().numpy(), dtype="<f4").data)
    return digest.hexdigest()
