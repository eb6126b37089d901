"""Find the head of a model of a task, and the part of a checkpoint's head that fits.

In:  a model of a task, the names that its checkpoint lacks, the classes of both.
Out: the head's names, those of its output layer, and the rows of a checkpoint's output layer in the
     order of the task's classes.

The head is what the model has beside the architecture's base model, and a pooler that is newly
initialised. Its output layer has a row a class. A checkpoint without an output layer is a bare
encoder: whatever else it holds is pretrained, and the head is what it lacks. A head that is not
trained stays what it is, and a mask leaves it alone.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from fedpet.backbone.module_roles import is_dense

__all__ = [
    "class_names",
    "generates",
    "head_names",
    "lost_names",
    "output_layer",
    "outside_base",
    "rows_of",
]


def outside_base(model: nn.Module) -> tuple[str, ...]:
    """List parameters that the task's class adds to the architecture's base model."""
    prefix = str(getattr(model, "base_model_prefix", ""))
    has_base = getattr(model, prefix, None) is not None if prefix else False
    return tuple(
        name
        for name, _ in model.named_parameters()
        if not (has_base and name.startswith(f"{prefix}."))
    )


def output_layer(model: nn.Module) -> tuple[str, ...]:
    """List parameters of the last Linear outside the base: it has a row an output."""
    outside = set(outside_base(model))
    last: tuple[str, ...] = ()
    for path, module in model.named_modules():
        names = tuple(f"{path}.{name}" for name, _ in module.named_parameters(recurse=False))
        if is_dense(module) and outside.issuperset(names):
            last = names
    return last


def head_names(
    model: nn.Module, lacking: Collection[str], *, has_output_layer: bool
) -> tuple[str, ...]:
    """List parameters of the head, in the order of the model.

    Args:
        model: Of the task.
        lacking: Names that the checkpoint does not hold in the model's shape.
        has_output_layer: Whether it holds that layer, for whatever number of classes.
    """
    outside = set(outside_base(model))
    return tuple(
        name
        for name, _ in model.named_parameters()
        if (name in outside and (has_output_layer or name in lacking))
        or (name in lacking and _is_of_pooler(name))
    )


def lost_names(
    model: nn.Module, lacking: Collection[str], *, has_head: bool = True
) -> tuple[str, ...]:
    """List parameters that a checkpoint lacks and that are not drawn: none in one that can be used.

    Args:
        model: Of the task.
        lacking: Names that the checkpoint does not hold in the model's shape.
        has_head: Whether what is outside the base model may be drawn.
    """
    head = set(head_names(model, lacking, has_output_layer=True)) if has_head else set()
    return tuple(
        name for name, _ in model.named_parameters() if name in lacking and name not in head
    )


def generates(model: nn.Module) -> bool:
    """Tell whether a model is one of language, whose output layer is no head of a task."""
    able = getattr(model, "can_generate", None)
    return bool(able is not None and able())


def class_names(config: object) -> tuple[str, ...]:
    """Return the classes that a config.json names, by index; () where it has no such list."""
    named = getattr(config, "id2label", None) or {}
    indices = range(len(named))
    return tuple(str(named[index]) for index in indices) if set(named) == set(indices) else ()


def rows_of(theirs: Sequence[str], ours: Sequence[str]) -> tuple[int, ...] | None:
    """Match each of the task's classes with the row of a checkpoint's output layer for it.

    Names are compared whatever their case. Where either side has numbers in the place of names,
    which is what transformers writes if nobody names the classes, the rows stand as they are.

    Returns:
        As many indices as there are classes, or None where the checkpoint has other classes.
    """
    at = {name.casefold(): index for index, name in enumerate(theirs)}
    wanted = [name.casefold() for name in ours]
    if len(at) == len(theirs) == len(ours) and set(wanted) == set(at):
        return tuple(at[name] for name in wanted)
    if _are_numbers(theirs) or _are_numbers(ours):
        return tuple(range(len(ours)))
    return None


def _are_numbers(names: Sequence[str]) -> bool:
    return all(name in (str(index), f"LABEL_{index}") for index, name in enumerate(names))


def _is_of_pooler(name: str) -> bool:
    return any("pooler" in part for part in name.split("."))
