"""The pretrained transformer that a federation shares, loaded and frozen.

    [backbone] -> mask -> structure -> search -> model -> codec
             -> plan -> client -> strategy -> ledger -> report

In:  a hub name, a folder, or `package:NAME` for a Python package that ships weights.
Out: a `Backbone`: the frozen model with a seeded head, and the fingerprint of its checkpoint.

The head's start is a function of a seed and of the parameters' names, so that every device draws
the same one, whatever it has drawn before. The fingerprint covers what came from the checkpoint
and leaves the head out.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from fedpet import embedded
from fedpet.config import BackboneConfig
from fedpet.errors import BackboneError
from fedpet.loading import without_collection
from fedpet.seeds import derive_seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG_FILE = "config.json"
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")


@dataclass
class Backbone:
    """A frozen pretrained model.

    Attributes:
        source: As the user named it.
        folder: Where its files lie: configuration, weights, tokeniser.
        model: float32, in evaluation mode, no parameter asks for a gradient.
        head: Names of the parameters that the checkpoint lacks; drawn from `head_seed`.
        fingerprint: SHA-256 (64 hex digits) of the checkpoint's names, shapes, dtypes and values.
    """

    source: str
    folder: Path
    model: PreTrainedModel
    head: tuple[str, ...]
    fingerprint: str


def load_backbone(
    config: BackboneConfig, *, num_outputs: int, regression: bool = False, device: str = "cpu"
) -> Backbone:
    """Load a checkpoint for classification, or for regression with one output.

    Args:
        config: Which checkpoint.
        num_outputs: Of the head.
        regression: Whether the one output is a number, and not a class.
        device: Where its model is to lie, see fedpet/device.py.

    Raises:
        BackboneError: The checkpoint is absent, out of reach, or not of a kind that classifies
            sequences.
    """
    folder = locate(config)
    with without_collection():
        backbone = _load(config, folder, num_outputs, regression)
        cast(Any, backbone.model).to(device)  # typed as if it took no name of a device
        return backbone


def _load(config: BackboneConfig, folder: Path, num_outputs: int, regression: bool) -> Backbone:
    from transformers import AutoConfig, AutoModelForSequenceClassification
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        model_config = AutoConfig.from_pretrained(folder)
        model_config.num_labels = num_outputs
        model_config.problem_type = "regression" if regression else "single_label_classification"
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder,
            config=model_config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise BackboneError(
            f"{config.model!r} could not be loaded as a model that classifies sequences: "
            f"{reason[:300]}"
        ) from None
    absent = set(info["missing_keys"]) | {entry[0] for entry in info["mismatched_keys"]}
    head = tuple(name for name, _ in model.named_parameters() if name in absent)
    _draw_head(model, head, config.head_seed)
    model.requires_grad_(False)
    model.eval()
    return Backbone(
        source=config.model,
        folder=folder,
        model=model,
        head=head,
        fingerprint=fingerprint(
            (name, parameter) for name, parameter in model.named_parameters() if name not in absent
        ),
    )


def locate(config: BackboneConfig) -> Path:
    """Find the folder that holds a checkpoint's files; a hub's are downloaded once.

    Raises:
        BackboneError: There is no such folder or package, or the hub is out of reach.
    """
    source = config.model
    if package := package_of(source):
        return _package_folder(package)
    path = Path(source).expanduser()
    if path.is_dir():
        if not any((path / name).exists() for name in WEIGHT_FILES):
            raise BackboneError(
                f"the folder {source!r} holds no weights: it needs config.json and one of "
                f"{', '.join(WEIGHT_FILES)}."
            )
        return path.resolve()
    if path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise BackboneError(f"there is no folder {source!r} to take a backbone from.")
    return _hub_folder(source, config.revision or None)


def locate_config(config: BackboneConfig) -> Path:
    """Find a model's config.json, weights or none beside it; of a hub's model that file alone.

    Args:
        config: Its model may also name a folder without weights, or a configuration file.

    Raises:
        BackboneError: There is no such file, folder or package, or the hub is out of reach.
    """
    source = config.model
    if package := package_of(source):
        return _package_folder(package) / CONFIG_FILE
    path = Path(source).expanduser()
    if path.is_file():
        return path.resolve()
    if path.is_dir():
        if not (path / CONFIG_FILE).is_file():
            raise BackboneError(f"the folder {source!r} holds no {CONFIG_FILE}.")
        return (path / CONFIG_FILE).resolve()
    if path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise BackboneError(f"there is no folder or file {source!r} to take a configuration from.")
    if path.suffix == ".json":
        raise BackboneError(f"there is no configuration file {source!r}.")
    from huggingface_hub import hf_hub_download

    try:
        return Path(
            hf_hub_download(source, CONFIG_FILE, revision=config.revision or None, etag_timeout=10)
        )
    except Exception as error:  # as in `_hub_folder`
        raise _out_of_reach(source, error) from None


def fingerprint(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, dtypes, shapes and values, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(parameters, key=lambda item: item[0]):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        raw = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(raw.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _draw_head(model: PreTrainedModel, names: Iterable[str], seed: int) -> None:
    """Matrices normal with the model's own standard deviation, biases 0, gains 1."""
    deviation = float(getattr(model.config, "initializer_range", None) or 0.02)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in names:
            parameter = parameters[name]
            if parameter.dim() > 1:
                generator = torch.Generator().manual_seed(derive_seed("head", seed, name))
                parameter.normal_(0.0, deviation, generator=generator)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)


def package_of(model: str) -> str:
    """The package that `backbone.model` names; "" where it names none."""
    if model == "embedded":
        return embedded.name_of(embedded.MODEL)
    return model.removeprefix("package:") if model.startswith("package:") else ""


def _package_folder(package: str) -> Path:
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise BackboneError(
            f"the backbone's package {package!r} is not installed: run "
            f"{embedded.how_to_install(embedded.pinned(package))}."
        ) from None
    for file in files:
        if file.name in WEIGHT_FILES:
            return Path(str(file.locate())).parent
    raise BackboneError(
        f"the package {package!r} holds no weights (none of {', '.join(WEIGHT_FILES)})."
    )


def _hub_folder(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    options: dict[str, Any] = {"revision": revision, "allow_patterns": list(HUB_FILES)}
    try:
        return Path(snapshot_download(name, **options, etag_timeout=10))
    except Exception as error:  # the hub's client raises a dozen kinds, of four libraries
        raise _out_of_reach(name, error) from None


def _out_of_reach(name: str, error: Exception) -> BackboneError:
    reason = " ".join(str(error).split())
    return BackboneError(
        f"{name!r} is no folder here, and the hub could not give it "
        f"({type(error).__name__}: {reason[:160]}). Download it beforehand, or give a folder "
        "or package:NAME."
    )
