"""A stranger's module: a loss, a metric and data collators that fedpet has never seen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedpet.data.collator import register_data_collator
from fedpet.training.loss import register_loss
from fedpet.training.metrics import register_metric


@register_loss("focal")
def focal(outputs: Any, labels: Tensor) -> Tensor:
    entropy = torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="none")
    return ((1 - torch.exp(-entropy)) ** 2 * entropy).mean()


def not_registered(outputs: Any, labels: Tensor) -> Tensor:
    raise AssertionError("a server must not have a node call this")


@register_metric("errors", greater_is_better=False)
def errors(eval_pred: Any) -> dict[str, float]:
    logits, labels = eval_pred
    wrong = logits.argmax(axis=1) != labels
    return {"errors": float(wrong.sum()), "rows": len(eval_pred.label_ids)}


@register_data_collator("four_tokens")
def four_tokens(features: list[dict[str, Any]]) -> dict[str, Tensor]:
    batch = {"labels": torch.tensor([row["labels"] for row in features])}
    for name in ("input_ids", "attention_mask"):
        rows = [torch.tensor(row[name][:4]) for row in features]
        batch[name] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return batch
