"""Describe the task of a run: its kind, the classes, the metrics; it travels with the plan."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Task"]


@dataclass(frozen=True)
class Task:
    """Kind of task by its name, the classes, and the metric."""

    kind: str  # see fedpet/tasks/task_kind.py
    label_names: tuple[str, ...]  # by class index; () where rows have no class
    metric: str  # the one that decides
    metrics: tuple[str, ...] = ()  # a user's, see fedpet/training/metrics.py
    weights: str = ""  # of updates: "" is the task's own, "rows" counts rows

    @property
    def num_outputs(self) -> int:
        """Outputs of the model's head: one a class, or one value."""
        return len(self.label_names) or 1
