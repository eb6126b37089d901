"""Load and freeze the pretrained transformer that a federation shares.

In:  a hub name, a folder, or `package:NAME` for a Python package that ships weights.
Out: a `Backbone`: the frozen model of a task with its head, and the checkpoint's fingerprint.

What of the head is drawn anew is a function of a seed and of the parameters' names, so that every
device draws the same, whatever it has drawn before. The fingerprint covers what came from the
checkpoint, a head with which it starts too, and leaves out what is drawn. The encoder itself is
never drawn: a mask over random numbers would mean nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from fedpet.backbone.checkpoint import locate
from fedpet.backbone.classifier import (
    class_names,
    head_names,
    lost_names,
    output_layer,
    rows_of,
)
from fedpet.backbone.quantised import QuantisedWeight, check_library, quantise
from fedpet.config import BackboneConfig
from fedpet.errors import BackboneError
from fedpet.tasks import Task, kind_of
from fedpet.tasks.regression import REGRESSION_NAMES
from fedpet.utils.gc_paused import gc_paused
from fedpet.utils.seeds import derive_seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "Backbone",
    "Origin",
    "class_for",
    "fingerprint",
    "load_backbone",
    "load_for_task",
    "locate",
]


@dataclass(frozen=True)
class Origin:
    """The sources of a model's parameters.

    Attributes:
        loaded: Tensors that the checkpoint gave.
        head_loaded: Names of those that are of the head.
        drawn: Names of the head's that were drawn from the seed.
        left_out: Tensors of the checkpoint that the model has no place for.
        classes: What was made of the checkpoint's classes where they are not the task's; or "".
    """

    loaded: int = 0
    head_loaded: tuple[str, ...] = ()
    drawn: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    classes: str = ""

    def lines(self) -> list[str]:
        """Say the same in words, a line for each thing that a user may not expect."""
        loaded = f"{self.loaded} tensors come from the checkpoint"
        if self.head_loaded:
            loaded += f", of the head {_listed(self.head_loaded)}"
        if self.drawn:
            loaded += f"; of the head drawn anew: {_listed(self.drawn)}"
        lines = [loaded]
        if self.classes:
            lines.append(self.classes)
        if self.left_out:
            lines.append(
                f"{len(self.left_out)} tensors of the checkpoint are left out, since the model "
                f"has no place for them: {_listed(self.left_out)}"
            )
        return lines

    def to_json(self) -> dict[str, Any]:
        """Make its entry of `result.json`."""
        return asdict(self)


@dataclass
class Backbone:
    """A frozen pretrained model.

    Attributes:
        source: As the user named it.
        folder: Where its files lie: configuration, weights, tokeniser.
        model: float32 or bfloat16, in evaluation mode, no parameter asks for a gradient.
        head: Names of the head's parameters, see fedpet/backbone/classifier.py; no mask or module
            acts on them.
        fingerprint: SHA-256 (64 hex digits) of the names, shapes, dtypes and values that came
            from the checkpoint; of quantised weights, the values that the bits mean.
        trains_head: Whether the head is trained, in full; else it stays the checkpoint's.
        origin: What came from the checkpoint, and what did not.
        shared: Whether its weights are a map of the checkpoint's file, which other processes map
            too: nothing is written into them.
        bits: In which its dense weights are stored, see `fedpet.backbone.quantised`; 0: as `model`
            has the others.
    """

    source: str
    folder: Path
    model: PreTrainedModel
    head: tuple[str, ...]
    fingerprint: str
    trains_head: bool = True
    origin: Origin = Origin()
    shared: bool = False
    bits: int = 0

    @classmethod
    def of_model(
        cls,
        model: nn.Module,
        head: tuple[str, ...],
        *,
        fingerprint: str = "",
        source: str = "",
        trains_head: bool = True,
    ) -> Backbone:
        """Take a user's own model, which is frozen, in the place of a checkpoint's.

        Args:
            model: Any module with a transformer's parts.
            head: See the attributes, as the others.
            fingerprint: "" where it is computed when it is needed.
            source: "" takes the name in the model's configuration.
            trains_head: See the attributes.
        """
        model.requires_grad_(False)
        return cls(
            source=source or str(getattr(getattr(model, "config", None), "_name_or_path", "")),
            folder=Path(),  # the model is at hand, and nothing more is read
            model=cast("PreTrainedModel", model),
            head=head,
            fingerprint=fingerprint,
            trains_head=trains_head,
        )

    @property
    def trained_head(self) -> tuple[str, ...]:
        """Name the head's parameters that are trained, all of them or none."""
        return self.head if self.trains_head else ()

    @property
    def pretrained_parameters(self) -> int:
        """Count the numbers in the model, without a head that is trained."""
        head = set(self.trained_head)
        return sum(p.numel() for name, p in self.model.named_parameters() if name not in head)


def load_backbone(
    config: BackboneConfig,
    *,
    num_outputs: int,
    regression: bool = False,
    label_names: Sequence[str] = (),
    device: str = "cpu",
) -> Backbone:
    """Load a checkpoint for classification, or for regression with one output.

    Args:
        config: Which checkpoint, and what is made of its head.
        num_outputs: Of the head.
        regression: Whether the one output is a number, and not a class.
        label_names: Of the classes, by index; () where they have none.
        device: Where its model is to lie, see fedpet/backbone/device.py.

    Raises:
        BackboneError: The checkpoint is absent, out of reach, damaged, not of a kind that
            classifies sequences, lacks some of its encoder, or lacks a head that is to be kept.
    """
    kind = "regression" if regression else "classification"
    names = () if regression else tuple(f"LABEL_{i}" for i in range(num_outputs))
    return load_for_task(config, Task(kind, tuple(label_names) or names, ""), device=device)


def load_for_task(config: BackboneConfig, task: Task, *, device: str = "cpu") -> Backbone:
    """Load a checkpoint for a task, whose classes its model carries by name.

    Raises:
        BackboneError: As `load_backbone`; or the task's model has no head to draw, and the
            checkpoint lacks some of it.
    """
    folder = locate(config)
    with gc_paused():
        backbone = _load(config, folder, task)
        cast(Any, backbone.model).to(device)  # typed as if it took no name of a device
        return backbone


def _load(config: BackboneConfig, folder: Path, task: Task) -> Backbone:
    import transformers
    from transformers.utils import logging as transformers_logging

    if config.bits:
        check_library(config.bits)
    kind, names = kind_of(task), task.label_names or REGRESSION_NAMES
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        model_config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        theirs = class_names(model_config)
        kind.set_labels(model_config, task.label_names)
        model, info = class_for(model_config, kind.model_class).from_pretrained(
            folder,
            config=model_config,
            dtype=getattr(torch, config.dtype),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
        )
    except Exception as error:  # transformers raises many kinds, of several libraries
        raise _unusable(config.model, kind.model_class, error) from None
    missing = set(info["missing_keys"])
    lacking = missing | {entry[0] for entry in info["mismatched_keys"]}
    if lost := lost_names(model, lacking, has_head=kind.has_head):
        raise _incomplete(config.model, model, lost, info)
    head: tuple[str, ...] = ()
    drawn: tuple[str, ...] = ()
    classes = ""
    if kind.has_head:
        has_output_layer = not missing.issuperset(output_layer(model))
        head = head_names(model, lacking, has_output_layer=has_output_layer)
        drawn, classes = _settle_head(config, model, head, lacking, theirs, names)
    _init_head(model, drawn, config.head_seed)
    model.requires_grad_(False)
    model.eval()
    if config.bits:
        quantise(model, config.bits, head)
        if not config.shared:
            _leave_file(model)
    taken = [(name, p) for name, p in model.named_parameters() if name not in drawn]
    return Backbone(
        source=config.model,
        folder=folder,
        model=model,
        head=head,
        fingerprint=fingerprint(taken),
        trains_head=config.head != "keep",
        origin=Origin(
            loaded=len(taken),
            head_loaded=tuple(name for name in head if name not in drawn),
            drawn=drawn,
            left_out=tuple(sorted(info["unexpected_keys"])),
            classes=classes,
        ),
        shared=config.shared,
        bits=config.bits,
    )


def class_for(config: Any, wanted: str) -> Any:
    """Return a task's class; where the architecture classifies images alone, that for those.

    Args:
        config: Of transformers.
        wanted: The class's name.
    """
    import transformers

    images: Any = transformers.AutoModelForImageClassification
    texts: Any = transformers.AutoModelForSequenceClassification
    if wanted == texts.__name__ and type(config) not in texts._model_mapping:
        return images if type(config) in images._model_mapping else texts
    return getattr(transformers, wanted)


def _settle_head(
    config: BackboneConfig,
    model: PreTrainedModel,
    head: tuple[str, ...],
    lacking: set[str],
    theirs: tuple[str, ...],
    ours: tuple[str, ...],
) -> tuple[tuple[str, ...], str]:
    """Split the head into drawn and loaded; bring a checkpoint's rows into the classes' order.

    Returns:
        The names to draw, and what to tell of the classes.
    """
    output = set(output_layer(model))
    if config.head == "new":
        return head, ""
    absent = tuple(name for name in head if name in lacking)
    if config.head == "keep" and absent:
        raise BackboneError(
            f"backbone.head = 'keep' leaves the checkpoint's head as it is, and {config.model!r} "
            f"has none for {len(ours)} outputs: {_listed(absent)} is not there in that shape. "
            "Take backbone.head = 'train'."
        )
    if output & lacking:  # another number of classes, or none at all
        return absent, ""
    rows = rows_of(theirs, ours)
    if rows is None:
        both = f"the checkpoint's classes are {_listed(theirs)} and the task's {_listed(ours)}"
        if config.head == "keep":
            raise BackboneError(
                f"backbone.head = 'keep' leaves the checkpoint's head as it is, and {both}: give "
                "the rows' labels the checkpoint's names, or take backbone.head = 'train'."
            )
        return tuple(n for n in head if n in lacking or n in output), f"{both}: drawn anew"
    if rows == tuple(range(len(ours))):
        return absent, ""
    with torch.no_grad():
        for name in output:
            parameter = model.get_parameter(name)
            parameter.copy_(parameter[list(rows)])
    return absent, (
        f"the checkpoint's classes are in the order {_listed(theirs)}: its output layer's rows "
        f"were brought into the task's, {_listed(ours)}"
    )


def _unusable(source: str, wanted: str, error: Exception) -> BackboneError:
    """Make the error, in words that do not ask for anything that fedpet has not."""
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if type(error).__name__ in ("SafetensorError", "UnpicklingError", "EOFError"):
        return BackboneError(
            f"the weights of {source!r} are damaged or cut short ({reason}): download them anew."
        )
    purposes = {"AutoModelForSequenceClassification": "a model that classifies sequences"}
    purpose = purposes.get(wanted, f"transformers' {wanted}")
    return BackboneError(f"{source!r} could not be loaded as {purpose} ({reason}).")


def _incomplete(
    source: str, model: PreTrainedModel, lost: tuple[str, ...], info: Mapping[str, Any]
) -> BackboneError:
    shapes = {name: (stored, wanted) for name, stored, wanted in info["mismatched_keys"]}
    if of_other_shape := [name for name in lost if name in shapes]:
        stored, wanted = (tuple(shape) for shape in shapes[of_other_shape[0]])
        reason = f"{of_other_shape[0]} is {stored} in the weights, {wanted} by config.json"
    elif info["unexpected_keys"]:
        reason = f"the weights have names such as {_listed(sorted(info['unexpected_keys']))}"
    else:
        reason = "nothing stands in their place"
    total = sum(1 for _ in model.named_parameters())
    return BackboneError(
        f"the checkpoint {source!r} lacks {len(lost)} of the {total} tensors of a "
        f"{type(model).__name__} outside a head that is drawn ({_listed(lost)}); {reason}. A mask "
        "over random numbers means nothing: give a config.json and weights that belong together, "
        "with the names that `save_pretrained` writes."
    )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _leave_file(model: nn.Module) -> None:
    """Give what is not quantised memory of its own: else all of the file would stay mapped."""
    for parameter in model.parameters():
        if not isinstance(parameter, QuantisedWeight):
            parameter.data = parameter.data.clone()


def fingerprint(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """Hash names, dtypes, shapes and values, in the order of the names: SHA-256."""
    digest = hashlib.sha256()
    for name, tensor in sorted(parameters, key=lambda item: item[0]):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        raw = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(raw.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _init_head(model: PreTrainedModel, names: Iterable[str], seed: int) -> None:
    """Draw matrices normal with the model's own standard deviation; set biases 0, gains 1."""
    deviation = float(getattr(model.config, "initializer_range", None) or 0.02)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in names:
            parameter = parameters[name]
            if parameter.dim() > 1:
                generator = torch.Generator().manual_seed(derive_seed("head", seed, name))
                drawn = torch.empty(parameter.shape).normal_(0.0, deviation, generator=generator)
                parameter.copy_(drawn)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
