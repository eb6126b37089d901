"""State what a task is: how columns become examples, its model's class, loss, weights and metrics.

One file a task, see `TaskKind`; a user's own joins by `register_task`. Reading an experiment needs
names of tasks and metrics alone, so these modules import torch and later stages where they compute.
"""

from fedpet.tasks import (
    classification,
    image_classification,
    instruction,
    language_modelling,
    multi_label,
    regression,
    seq2seq,
    speech_to_text,
    text_to_text,
    token_classification,
)
from fedpet.tasks.task import Task
from fedpet.tasks.task_kind import (
    TASKS,
    BatchLoss,
    Encoding,
    RawRows,
    TaskKind,
    kind_of,
    portable_name,
    register_task,
)

__all__ = [
    "TASKS",
    "BatchLoss",
    "Encoding",
    "RawRows",
    "Task",
    "TaskKind",
    "classification",
    "image_classification",
    "instruction",
    "kind_of",
    "language_modelling",
    "multi_label",
    "portable_name",
    "register_task",
    "regression",
    "seq2seq",
    "speech_to_text",
    "text_to_text",
    "token_classification",
]
