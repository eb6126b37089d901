"""Search a structure for a model of one's own, on the rows that it would be trained with.

In:  a transformer, rows as `transformers.Trainer` takes them, a budget.
Out: a `Structure`, which `PetConfig(modules=...)` puts on the model; the model is as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from fedpet.backbone.classifier import class_names, generates
from fedpet.backbone.module_roles import maskable_weights
from fedpet.backbone.pretrained import Backbone, fingerprint
from fedpet.config import MaskConfig, SearchConfig, TrainingConfig
from fedpet.data.rows import Rows
from fedpet.errors import DataError
from fedpet.pet.factory import trained_in_full
from fedpet.pet.kernels.matmul_timing import settle_product
from fedpet.pet.mask import build_mask
from fedpet.pet.structure import Structure
from fedpet.pet.trainable_model import check_plain
from fedpet.search.central import run_search
from fedpet.search.settings import resolve_settings
from fedpet.tasks import Task

__all__ = ["rows_from_dataset", "search_structure", "task_of_model"]


def search_structure(
    model: nn.Module,
    dataset: Iterable[Mapping[str, Any]],
    config: SearchConfig,
    *,
    mask: MaskConfig | None = None,
    modules_to_save: Sequence[str] | None = None,
    training: TrainingConfig | None = None,
) -> Structure:
    """Search by gradient which small modules go where, under a budget (S3PET).

    Args:
        model: A transformer that classifies or regresses, in float32. It is given back as it was,
            its parameters frozen.
        dataset: Tokenised rows, such as a `datasets.Dataset`: "input_ids" and "labels" of each,
            and "attention_mask" where rows are padded.
        config: Budget, space, steps; learning rates that it leaves at 0 are those of `training`.
        mask: Trained beside the candidates, where the federation will have it; of the space
            "joint" the rule that ranks its blocks.
        modules_to_save: Trained in full beside them, as in `PetConfig`.
        training: Rates, the loss and the logit adjustment; None takes the defaults.

    Returns:
        The modules, how sure the search was of each (`gates`), and the settings (`provenance`).

    Raises:
        StructureError: The budget does not fit the space, or the space this model.
        DataError: Rows of another form, or too few of them.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> small = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        ...                    intermediate_size=64, vocab_size=50)
        >>> model = BertForSequenceClassification(small)
        >>> rows = [{"input_ids": [2, 5 + i % 9, 3], "labels": i % 2} for i in range(40)]
        >>> found = search_structure(model, rows, SearchConfig(budget=300, max_steps=4))
        >>> sum(found.gates) > 0, found.provenance["values"] <= 300
        (True, True)
        >>> adapted = get_pet_model(model, PetConfig(modules=found))
        >>> sum(s.size for s in adapted.segments if s.kind != "head") <= 300
        True
    """
    check_plain(model)
    training = TrainingConfig() if training is None else training
    head = trained_in_full(model, modules_to_save)
    named = [(n, p) for n, p in model.named_parameters() if n not in head]
    rows = rows_from_dataset(dataset, model)
    backbone = Backbone.of_model(model, head, fingerprint=fingerprint(named))
    chosen = None
    if mask is not None and config.space != "joint":
        chosen = build_mask(maskable_weights(model, head), mask)
    settled = resolve_settings(
        config,
        training,
        backbone_parameters=sum(parameter.numel() for _, parameter in named),
        mask_values=0 if chosen is None else chosen.num_values,
    )
    was_training = model.training
    try:
        return run_search(
            backbone,
            rows,
            np.arange(len(rows)),
            task_of_model(model),
            settled,
            mask=chosen,
            mask_config=mask,
            logit_adjustment=training.logit_adjustment,
            loss=training.loss,
            products=settle_product(training, model, None).matmul_backend,
        ).structure
    finally:
        model.train(was_training)


def task_of_model(model: nn.Module) -> Task:
    """Return a model's task: what its configuration states, or language modelling if it generates.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> small = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        ...                    intermediate_size=8, vocab_size=9, id2label={0: "no", 1: "yes"})
        >>> task_of_model(BertForSequenceClassification(small)).label_names
        ('no', 'yes')
    """
    config: Any = getattr(model, "config", None)
    if generates(model):
        return Task("language-modelling", (), "perplexity")
    num_labels = int(getattr(config, "num_labels", 0))
    if num_labels == 1 or getattr(config, "problem_type", None) == "regression":
        return Task("regression", (), "pearson")
    names = class_names(config) or tuple(str(index) for index in range(num_labels))
    return Task("classification", names, "accuracy")


def rows_from_dataset(dataset: Iterable[Mapping[str, Any]], model: nn.Module) -> Rows:
    """Take rows as `Trainer` takes them, padding removed.

    Args:
        dataset: "input_ids" and "labels" (or "label") of each row, "attention_mask" where it is
            padded, "token_type_ids" where the model has them.
        model: States the token that rows are padded with.

    Raises:
        DataError: No rows, or a row of another form.

    Example:
        >>> rows = rows_from_dataset([{"input_ids": [2, 7, 0], "attention_mask": [1, 1, 0],
        ...                            "labels": 1}], torch.nn.Linear(1, 1))
        >>> rows.tokens.tolist(), rows.labels.tolist()
        ([2, 7], [1])
    """
    tokens: list[np.ndarray] = []
    types: list[np.ndarray] = []
    labels: list[Any] = []
    for number, row in enumerate(dataset):
        try:
            ids = np.asarray(row["input_ids"], dtype=np.int32).reshape(-1)
            label = row["labels"] if "labels" in row else row["label"]
            labels.append(np.asarray(label).reshape(())[()])
            inside = np.asarray(row.get("attention_mask", np.ones_like(ids)), dtype=bool)
            tokens.append(ids[inside])
            if "token_type_ids" in row:
                types.append(np.asarray(row["token_type_ids"], dtype=np.uint8)[inside])
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise DataError(
                f"row {number + 1} must be a mapping with 'input_ids' and one 'labels', as Trainer "
                f"takes it, but: {type(error).__name__}: {error}. Tokenise the rows first."
            ) from None
    if not tokens or (types and len(types) < len(tokens)):
        raise DataError(
            "a search needs rows, with 'token_type_ids' in all of them or in none, got "
            f"{len(tokens)} rows, {len(types)} of them with."
        )
    values = np.asarray(labels)
    whole = values.dtype.kind in "iub" and task_of_model(model).kind == "classification"
    return Rows(
        tokens=np.concatenate(tokens),
        offsets=np.concatenate([[0], np.cumsum([len(row) for row in tokens])]).astype(np.int64),
        labels=values.astype(np.int64 if whole else np.float32),
        types=np.concatenate(types) if types else None,
        pad_id=int(getattr(getattr(model, "config", None), "pad_token_id", None) or 0),
    )
