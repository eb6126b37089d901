"""Set up each baseline's model: everything trained, peft's LoRA, or the head alone.

LoRA is peft's: rank 8, alpha 16, on the positions that peft itself names for the architecture
(query and value in BERT), its factors both trained, and the head by `modules_to_save`.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import nn

from fedpet.backbone.device import check_device
from fedpet.backbone.pretrained import Backbone, load_for_task
from fedpet.config import Experiment
from fedpet.data import FederatedData
from fedpet.errors import BackboneError, ConfigError
from fedpet.training.input_checks import settle_padding
from fedpet.utils.seeds import derive_seed

LORA_RANK = 8
LORA_ALPHA = 16

Groups = dict[str, dict[str, nn.Parameter]]  # kind of module -> name -> what is trained


def _full(backbone: Backbone, seed: int) -> tuple[nn.Module, Groups]:
    """Train every parameter of the model."""
    named = dict(backbone.model.named_parameters())
    return backbone.model, {
        "full": {name: p for name, p in named.items() if name not in backbone.head},
        "head": {name: named[name] for name in backbone.head},
    }


def _peft_lora(backbone: Backbone, seed: int) -> tuple[nn.Module, Groups]:
    """Train LoRA as peft sets it up for a classifier; its down-projections drawn from `seed`."""
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
    """Train the head alone."""
    named = dict(backbone.model.named_parameters())
    return backbone.model, {"head": {name: named[name] for name in backbone.head}}


METHODS: Mapping[str, Callable[[Backbone, int], tuple[nn.Module, Groups]]] = {
    "full": _full,
    "peft-lora": _peft_lora,
    "head": _head_only,
}


def _head_modules(backbone: Backbone) -> list[str]:
    """Return paths of the outermost modules that hold parameters of the head and no others."""
    found: list[str] = []
    for path, module in backbone.model.named_modules():
        names = [f"{path}.{name}" for name, _ in module.named_parameters()]
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if path and names and not inside and set(names) <= set(backbone.head):
            found.append(path)
    return found


class Baseline:
    """Hold a model, and the tensors of it that one method trains and sends.

    Args:
        method: One of `METHODS`.
        experiment: Names the checkpoint, and seeds what is drawn.
        data: Its task decides the head.

    Attributes:
        model: Called with a batch.
        groups: Kind of module -> name -> parameter.
        tensors: The same without the kinds, in the order in which they are sent.
        fingerprint: Of the checkpoint.
        origin: What came from it, and what did not.
        pretrained_parameters: Of the checkpoint, whether trained or not.
    """

    def __init__(self, method: str, experiment: Experiment, data: FederatedData) -> None:
        if method not in METHODS:
            raise ConfigError(f"unknown baseline {method!r}. Known are: {', '.join(METHODS)}.")
        if experiment.backbone.head == "keep":
            raise ConfigError(
                "a baseline trains the head, and backbone.head is 'keep': take 'train' or 'new'."
            )
        device = check_device(experiment.run.device)
        backbone = load_for_task(experiment.backbone, data.task, device=device)
        settle_padding(backbone.model, data.train)
        self.fingerprint = backbone.fingerprint
        self.origin = backbone.origin
        self.pretrained_parameters = backbone.pretrained_parameters
        self.model, self.groups = METHODS[method](backbone, experiment.run.seed)
        self.tensors: dict[str, nn.Parameter] = {}
        for group in self.groups.values():
            self.tensors |= group
        self.model.requires_grad_(False)
        for tensor in self.tensors.values():
            tensor.requires_grad_(True)
        self.model.eval()

    def arrays(self) -> ArrayRecord:
        """Return the trainable tensors, copied."""
        return ArrayRecord(
            {name: Array(p.detach().cpu().numpy()) for name, p in self.tensors.items()}
        )

    @torch.no_grad()
    def load(self, arrays: ArrayRecord) -> None:
        """Write the tensors of a message into the model."""
        for name, tensor in self.tensors.items():
            tensor.copy_(torch.from_numpy(arrays[name].numpy()))

    def values_by_kind(self) -> dict[str, int]:
        """Count the numbers that are sent, by kind."""
        return {
            kind: sum(tensor.numel() for tensor in group.values())
            for kind, group in self.groups.items()
        }

    def values_sha256(self) -> str:
        """Return the SHA-256 of the tensors, float32, little-endian, in the order they are sent."""
        digest = hashlib.sha256()
        for tensor in self.tensors.values():
            digest.update(np.ascontiguousarray(tensor.detach().numpy(), dtype="<f4").data)
        return digest.hexdigest()
