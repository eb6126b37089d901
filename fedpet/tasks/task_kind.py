"""Define a kind of task: all that rows, model, training and evaluation ask of it, in one class.

In:  a configuration, columns of rows, a model's outputs.
Out: examples, a loss, weights of updates, metrics.

    columns -> read -> encode -> (arrange) -> Rows -> client_loss, outputs -> metrics

A kind is registered by name. In other processes (Ray's workers, nodes) a user's own is found by its
import path, "package.module:Class".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from fedpet.errors import ConfigError
from fedpet.utils.named_callables import NamedCallables

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    from fedpet.config import DataConfig, Experiment
    from fedpet.data.column import Column
    from fedpet.data.padding import Padding
    from fedpet.data.rows import Rows
    from fedpet.data.split_rows import Split
    from fedpet.tasks.task import Task

__all__ = [
    "TASKS",
    "BatchLoss",
    "Encoding",
    "RawRows",
    "TaskKind",
    "kind_of",
    "portable_name",
    "refuse_class_settings",
    "refuse_settings",
    "register_task",
]

# Of a model, a batch's inputs and its labels: a scalar.
BatchLoss = Callable[["nn.Module", "Mapping[str, Tensor]", "Tensor"], "Tensor"]


@dataclass(frozen=True)
class RawRows:
    """Rows of a split as they were read and checked.

    Attributes:
        columns: Texts, or what stands for them: each of n values.
        labels: One a row, of the task's type: (n,); or (n, classes).
        label_names: The classes, where `encode` needs them.
        folder: Of the source's files, where paths in rows begin; None where it has none.
    """

    columns: Sequence[Column]
    labels: np.ndarray
    label_names: tuple[str, ...] = ()
    folder: Path | None = None


@dataclass(frozen=True)
class Encoding:
    """Say which rows become examples, and by what.

    Attributes:
        numbers: Of the rows, int64 (k,), ascending.
        data: The settings.
        folder: The tokeniser's.
        where: The split, for messages.
        spools: Folder for what outgrows memory.
        on_rows: Is called with the number of rows done.
    """

    numbers: np.ndarray
    data: DataConfig
    folder: Path
    where: str
    spools: Path | None = None
    on_rows: Callable[[int], None] = lambda rows: None


class TaskKind:
    """Define a task; a subclass overrides what differs from a classification of texts.

    Attributes:
        metrics: Built-in metrics by name, the usual one first: functions of what `compared` gives.
        lower_is_better: Names of those and of `written_metrics` where less is better.
        written_metrics: Names of those that are taken, where they are asked for, of texts that the
            model writes, see fedpet/training/text_metrics.py.
        model_class: Of transformers, whose `from_pretrained` loads the model.
        pipeline: The hub's word for it, for a model card.
        has_labels: Rows have a column of labels.
        has_classes: Rows have a class each, or several, whose names are the data's.
        has_label_lists: A row's label is a list.
        has_head: The checkpoint need not hold the model's outermost layers: they are drawn.
        reads_files: Rows may name files, whose content decides the examples.
        packs: `arrange` cuts the rows of a client into examples.
        stacks: A batch's loss is the mean of `row_losses`, so that many clients train at once.
    """

    metrics: ClassVar[Mapping[str, Callable[..., float]]] = {}
    lower_is_better: ClassVar[frozenset[str]] = frozenset()
    written_metrics: ClassVar[frozenset[str]] = frozenset()
    model_class: ClassVar[str] = "AutoModelForSequenceClassification"
    pipeline: ClassVar[str] = "text-classification"
    has_labels: ClassVar[bool] = False
    has_classes: ClassVar[bool] = False
    has_label_lists: ClassVar[bool] = False
    has_head: ClassVar[bool] = True
    reads_files: ClassVar[bool] = False
    packs: ClassVar[bool] = False
    stacks: ClassVar[bool] = False

    # Settings.

    def check_data(self, data: DataConfig) -> None:
        """Refuse keys of [data] that this task cannot have.

        Raises:
            ConfigError: With the key, what came, and what to do.
        """
        if not 1 <= len(data.text_columns) <= 2:
            raise ConfigError(
                f"data.text-columns must name one column, or two for pairs of texts, got "
                f"{list(data.text_columns)}."
            )

    def check_experiment(self, experiment: Experiment) -> None:
        """Refuse settings of other stages that this task cannot have.

        Raises:
            ConfigError: With the key, what came, and what to do.
        """

    # Rows.

    def columns(self, data: DataConfig) -> tuple[str, ...]:
        """Name the columns by whose content rows are told apart, and held out."""
        return data.text_columns

    def key(self, data: DataConfig) -> dict[str, Any]:
        """Return what decides the examples beside the columns: JSON values, for the cache."""
        return {}

    def class_names(
        self, labels: Sequence[Any], where: str, known: tuple[str, ...]
    ) -> tuple[str, ...]:
        """Read the names of the classes off all labels of the training split.

        Args:
            labels: As the source gives them.
            where: The split, for messages.
            known: The names that the source tells, which then are the classes.

        Raises:
            DataError: The labels name no classes.
        """
        from fedpet.tasks.class_labels import read_off_label_names

        if self.has_label_lists:
            from fedpet.tasks.label_lists import read_lists

            labels = [label for row in read_lists(labels, where) for label in row]
            where = f"the labels, one after the other, of {where}"
        return read_off_label_names(labels, where, known)

    def read(self, split: Split, data: DataConfig, task: Task) -> RawRows:
        """Read and check all rows of a split.

        Raises:
            DataError: A row that cannot be used, with its number.
        """
        raise NotImplementedError

    def encode(self, rows: RawRows, how: Encoding) -> tuple[dict[str, Any], Padding]:
        """Turn rows into token ids.

        Args:
            rows: All of the split.
            how: Which of them, and by what.

        Returns:
            Arrays of `Rows`: `tokens`, `offsets`, `labels`, and `types`, `marks`, `tags`,
            `choices` or those of `dense_of` where the task has them; and what rows are filled up
            with.
        """
        raise NotImplementedError

    def arrange(
        self, arrays: Mapping[str, np.ndarray], groups: Sequence[np.ndarray], data: DataConfig
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Cut the rows of each group into examples, where the task `packs`.

        Args:
            arrays: Of `encode`.
            groups: Row numbers of each client.
            data: The settings.

        Returns:
            Arrays of the examples, group by group; how many each group has, (groups,).
        """
        raise NotImplementedError

    def sizes(self, rows: RawRows) -> np.ndarray:
        """Reckon the tokens of each row without a tokeniser, (n,), for an estimate."""
        raise NotImplementedError

    def tokenizer_hash(self, folder: Path) -> str:
        """Return the hash of all in a checkpoint's folder that turns a row into a model's inputs.

        Raises:
            DataError: Nothing there does.
        """
        from fedpet.data.tokenize import hash_tokenizer  # a later stage

        return hash_tokenizer(folder)

    # Model.

    def set_labels(self, model_config: Any, task_names: Sequence[str]) -> None:
        """Write the classes into a model's configuration before it is built."""

    # Training.

    def client_loss(
        self, task: Task, labels: np.ndarray, strength: float, device: torch.device
    ) -> BatchLoss:
        """Return the loss that a client trains on.

        Args:
            task: Its classes.
            labels: Of all rows that the client trains on.
            strength: Of the logit adjustment; 0 leaves the logits alone.
            device: Of the model.
        """
        raise NotImplementedError

    def row_losses(self, task: Task, logits: Tensor, targets: Tensor) -> Tensor:
        """Compute the loss of each row, (rows,), of logits that are adjusted already."""
        raise NotImplementedError

    def weight(self, rows: Rows, indices: np.ndarray) -> int:
        """Count what the loss of these rows is a mean over: the weight of an update, and of it."""
        return len(indices)

    # Evaluation.

    def outputs(self, model: nn.Module, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        """Return what the metrics need of a batch, (rows, numbers): the logits."""
        found: Tensor = model(**inputs).logits.float()
        return found

    def check_outputs(self, task: Task, outputs: np.ndarray, labels: np.ndarray) -> None:
        """Refuse outputs of another shape.

        Raises:
            ValueError: No rows, or shapes that do not belong together.
        """
        shapes: list[tuple[int, ...]] = [(len(labels), task.num_outputs)]
        if not self.has_classes:
            shapes.append((len(labels),))
        if not len(labels) or outputs.shape not in shapes:
            raise ValueError(
                f"{len(labels)} labels need outputs of shape {shapes[0]} with at least one row, "
                f"got {outputs.shape}."
            )

    def compared(self, task: Task, outputs: np.ndarray, labels: np.ndarray) -> tuple[Any, ...]:
        """Return what the built-in metrics are functions of."""
        raise NotImplementedError

    def facts(self, task: Task, outputs: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """Return further attributes of an `Assessment`: the baseline, what is predicted."""
        return {}


def refuse_settings(experiment: Experiment, reasons: Mapping[str, bool]) -> None:
    """Refuse settings that a task cannot have.

    Args:
        experiment: Names the task.
        reasons: For each setting, in words, whether it is there.

    Raises:
        ConfigError: The first that is.
    """
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(
                f"{reason}, and data.task = {experiment.data.task!r} has none: leave the key out"
                + (", or take 'column' or 'iid'." if "partition" in reason else ".")
            )


def refuse_class_settings(experiment: Experiment) -> None:
    """Refuse settings that go by the one class of a row.

    Raises:
        ConfigError: With the key.
    """
    rule = experiment.clients.partition
    adjusted = bool(experiment.training.logit_adjustment)
    refuse_settings(
        experiment,
        {
            "training.logit-adjustment goes by the shares of classes": adjusted,
            f"clients.partition = {rule!r} deals rows out by label": rule
            in ("dirichlet", "shards"),
        },
    )


_Kind = TypeVar("_Kind", bound=type[TaskKind])

TASKS: NamedCallables[type[TaskKind]] = NamedCallables(
    "task", "fedpet.register_task", only_registered=True
)


def register_task(name: str) -> Callable[[_Kind], _Kind]:
    """Make a kind of task known by a name, for `data.task`.

    It is a subclass of `fedpet.TaskKind`. Nodes and Ray's workers import it, so it must stand in a
    module that they can import; there the same key names it as "package.module:Class".

    Args:
        name: The name.

    Raises:
        ConfigError: The name belongs to another kind.

    Example:
        >>> from fedpet.tasks.regression import Regression
        >>> @register_task("scores")
        ... class Scores(Regression):
        ...     lower_is_better = frozenset({"mae", "worst"})
        ...     metrics = {**Regression.metrics, "worst": lambda a, b: float(abs(a - b).max())}
        >>> list(Scores.metrics)
        ['pearson', 'mae', 'worst']
    """

    def register(kind: _Kind) -> _Kind:
        TASKS.add(name, kind)
        return kind

    return register


def portable_name(name: str) -> str:
    """Return the name by which other processes find a kind: of a user's own its import path."""
    path = TASKS.portable(name)
    return name if path.startswith("fedpet.") else path


def kind_of(task: Task | str) -> TaskKind:
    """Return the kind of a task, or of its name or import path.

    Raises:
        ConfigError: There is none.

    Example:
        >>> list(kind_of("regression").metrics)
        ['pearson', 'mae']
    """
    kind = TASKS.find(task if isinstance(task, str) else task.kind)
    return _MADE.setdefault(kind, kind())


_MADE: dict[type[TaskKind], TaskKind] = {}
