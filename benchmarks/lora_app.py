"""Fine-tune LoRA of peft on Flower as its users do, in the way of FlowerTune's template.

Nothing here is fedpet's. Each client is a SuperNode. A message brings the adapter's state dict as
an ArrayRecord, an array a tensor; the worker trains on the client's texts in plain torch and
answers with the trained state dict; Flower's FedAvg averages them. The template loads the
checkpoint and makes the adapter for every message. `Job.cached` keeps both in the worker's process,
as a careful user would.

Deviations from the template: the message names its client, so that each round trains the clients
that another program draws; dropout is off.
"""

from __future__ import annotations

import functools
import json
import random
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from peft import (
    LoraConfig,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
)
from transformers.utils import logging as transformers_logging

Clients = Mapping[str, Sequence[tuple[str, int]]]  # client -> its texts and classes


@dataclass(frozen=True)
class Job:
    """Say what every process of an app must know.

    Attributes:
        model: Folder of the checkpoint and its tokeniser.
        rows: JSON file of the clients' texts and classes, see `Clients`.
        num_labels: Number of classes.
        linears: "all-linear" for every linear layer, "" for peft's choice, query and value in BERT.
        cached: Whether a worker keeps checkpoint, adapter and tokeniser between messages.
        batch_size, max_length, learning_rate, num_rounds: Of the training; the rate falls to 0.
    """

    model: str
    rows: str
    num_labels: int
    linears: str
    cached: bool
    batch_size: int
    max_length: int
    learning_rate: float
    num_rounds: int


def load_model(job: Job) -> Any:
    """Load the checkpoint, and put LoRA of rank 8 and a new head on it."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with warnings.catch_warnings():
        # peft asks transformers by a name that transformers 5.23 calls deprecated
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        model = AutoModelForSequenceClassification.from_pretrained(
            job.model, num_labels=job.num_labels, dtype=torch.float32
        )
        config = LoraConfig(
            task_type=TaskType.SEQ_CLS, r=8, lora_alpha=16, target_modules=job.linears or None
        )
        return get_peft_model(model, config)


def load_tokenizer(job: Job) -> Any:
    """Load the tokeniser."""
    return AutoTokenizer.from_pretrained(job.model)


@functools.lru_cache(maxsize=1)
def load_clients(job: Job) -> Clients:
    """Read all clients' rows: once a process, as the template keeps its data set."""
    clients: Clients = json.loads(Path(job.rows).read_text(encoding="utf-8"))
    return clients


_kept_model = functools.lru_cache(maxsize=1)(load_model)
_kept_tokenizer = functools.lru_cache(maxsize=1)(load_tokenizer)


def train(message: Message, job: Job) -> Message:
    """Train one client for an epoch."""
    config = message.content.config_records["config"]
    model = (_kept_model if job.cached else load_model)(job)
    tokenizer = (_kept_tokenizer if job.cached else load_tokenizer)(job)
    set_peft_model_state_dict(model, message.content.array_records["arrays"].to_torch_state_dict())
    texts, labels = zip(*load_clients(job)[str(config["client"])], strict=True)
    encoded = tokenizer(list(texts), truncation=True, max_length=job.max_length)
    rows = [
        {**{name: column[i] for name, column in encoded.items()}, "labels": label}
        for i, label in enumerate(labels)
    ]
    batches: DataLoader[Any] = DataLoader(
        rows,  # type: ignore[arg-type]  # a list is a data set
        batch_size=job.batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(int(config["server-round"])),  # type: ignore[arg-type]
        collate_fn=DataCollatorWithPadding(tokenizer),
    )
    progress = (int(config["server-round"]) - 1) / job.num_rounds  # type: ignore[arg-type]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job.learning_rate * (1 - progress), weight_decay=0.0)
    total = 0.0
    for batch in batches:
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)  # as the template's Trainer does
        optimizer.step()
        total += float(loss.detach()) * len(batch["labels"])
    content = RecordDict(
        {
            "arrays": ArrayRecord(get_peft_model_state_dict(model)),
            "metrics": MetricRecord({"train-loss": total / len(rows), "num-examples": len(rows)}),
        }
    )
    return Message(content, reply_to=message)


class NamedClients(FedAvg):
    """Flower's FedAvg, whose messages name the clients of the round.

    Args:
        draw: Gives a round's clients.

    Attributes:
        last: Number of clients, a message and a reply of the last round.
    """

    def __init__(self, draw: Callable[[int], Sequence[str]]) -> None:
        # the fraction is below one node, so that the smallest number of nodes is what is drawn
        super().__init__(fraction_train=1e-9, fraction_evaluate=0.0, min_available_nodes=1)
        self.draw = draw
        self.last: tuple[int, Message, Message] | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample as many nodes as there are clients, and give each one's message a name."""
        names = self.draw(server_round)
        self.min_train_nodes = len(names)
        self._sent = []
        unnamed = super().configure_train(server_round, arrays, config, grid)
        for name, node in zip(names, (message.metadata for message in unnamed), strict=True):
            told = ConfigRecord({**config, "client": name})
            content = RecordDict({"arrays": arrays, "config": told})
            self._sent.append(Message(content, node.dst_node_id, node.message_type))
        return self._sent

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average as Flower does, and keep a pair of messages to weigh."""
        replies = list(replies)
        for reply in replies:
            if reply.has_error():
                raise RuntimeError(f"a client failed: {reply.error.reason}")
        self.last = len(replies), self._sent[0], replies[0]
        return super().aggregate_train(server_round, replies)

    def summary(self) -> None:
        """Say nothing."""


def serve(
    grid: Grid, job: Job, draw: Callable[[int], Sequence[str]], after_round: Callable[[int], None]
) -> tuple[int, Message, Message]:
    """Run all rounds.

    Args:
        grid: Flower's.
        job: What to train.
        draw: Gives a round's clients.
        after_round: Is called with the round's number after each average, and with 0 before all.

    Returns:
        `NamedClients.last`.
    """
    random.seed(0)
    torch.manual_seed(0)
    strategy = NamedClients(draw)

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        after_round(server_round)
        return None

    strategy.start(
        grid,
        ArrayRecord(get_peft_model_state_dict(load_model(job))),
        num_rounds=job.num_rounds,
        evaluate_fn=evaluate,
    )
    assert strategy.last is not None
    return strategy.last
