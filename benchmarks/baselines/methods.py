"""Set up each baseline's model: everything trained, a method of peft, or the head alone.

LoRA is peft's, scaled by alpha / rank = 2: "peft-lora" is of rank 8 on the positions that peft
itself names for the architecture (query and value in BERT), "-r1" of rank 1, "-all" on every dense
layer of the blocks. Both factors are trained; "ffa-lora" freezes the down-projections, which all
clients draw alike (Sun et al., ICLR 2024, arXiv:2403.12313). "-r32" is FlowerTune's: rank 32, alpha
64, on query and value. "supertuning" is peft's as well: of
every dense layer of the blocks the entries largest in magnitude, as many as the experiment's
mask.density says; "-bottom" takes the smallest (arXiv:2607.09287). The head goes by
`modules_to_save`.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import nn

from fedpet.backbone.device import check_device
from fedpet.backbone.module_roles import find_target_modules
from fedpet.backbone.pretrained import Backbone, load_for_task
from fedpet.config import Experiment
from fedpet.data import FederatedData
from fedpet.errors import BackboneError, ConfigError
from fedpet.pet.modules.registry import ALL_LINEAR
from fedpet.tasks import kind_of
from fedpet.training.input_checks import settle_padding
from fedpet.utils.seeds import derive_seed

LORA_RANK = 8
LORA_SCALE = 2  # alpha / rank

Groups = dict[str, dict[str, nn.Parameter]]  # kind of module -> name -> what is trained


def _full(backbone: Backbone, experiment: Experiment) -> tuple[nn.Module, Groups]:
    """Train every parameter of the model."""
    named = dict(backbone.model.named_parameters())
    return backbone.model, {
        "full": {name: p for name, p in named.items() if name not in backbone.head},
        "head": {name: named[name] for name in backbone.head},
    }


def _peft_lora(
    backbone: Backbone,
    experiment: Experiment,
    *,
    rank: int = LORA_RANK,
    everywhere: bool = False,
    frozen_down: bool = False,
) -> tuple[nn.Module, Groups]:
    """Train LoRA as peft sets it up for a classifier; its down-projections drawn from the seed."""
    settings: dict[str, Any] = {"r": rank, "lora_alpha": LORA_SCALE * rank}
    if everywhere:
        settings["target_modules"] = _dense_layers(backbone)
    model = _with_peft(backbone, experiment.run.seed, "LoraConfig", "peft-lora", settings)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return model, {
        "lora": {
            name: p
            for name, p in trained.items()
            if ".lora_B." in name or (".lora_A." in name and not frozen_down)
        },
        "head": {name: p for name, p in trained.items() if ".lora_" not in name},
    }


def _supertuning(
    backbone: Backbone, experiment: Experiment, *, largest: bool
) -> tuple[nn.Module, Groups]:
    """Train peft's sparse entries: of each dense layer those of one end of the magnitudes."""
    settings: dict[str, Any] = {
        "target_modules": _dense_layers(backbone),
        "sparsity": 1 - experiment.mask.density,
        "select_top": largest,
    }
    model = _with_peft(
        backbone, experiment.run.seed, "SupertuningConfig", "peft-supertuning", settings
    )
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    inside = {name: p for name, p in trained.items() if ".supertuning_" in name}
    head = {name: p for name, p in trained.items() if name not in inside}
    return model, {"supertuning": inside, "head": head}


def _with_peft(
    backbone: Backbone, seed: int, config: str, purpose: str, settings: Mapping[str, Any]
) -> nn.Module:
    """Put a method of peft on the backbone, what it draws drawn from the seed and its purpose."""
    try:
        import peft
    except ImportError:
        raise ConfigError(
            "the LoRA baseline is peft's, which is not installed here: pip install 'fedpet[bench]'."
        ) from None
    heads = _head_modules(backbone)
    made = getattr(peft, config)(
        task_type=peft.TaskType.SEQ_CLS if heads else peft.TaskType.CAUSAL_LM,
        modules_to_save=heads or None,
        **settings,
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # peft asks transformers by a name that transformers 5.23 calls deprecated
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        torch.manual_seed(derive_seed(purpose, seed))
        try:
            model: nn.Module = peft.get_peft_model(backbone.model, made)
        except ValueError as error:
            raise BackboneError(
                f"peft does not know where LoRA goes in {backbone.source!r}: {error}"
            ) from None
    return model


def _head_only(backbone: Backbone, experiment: Experiment) -> tuple[nn.Module, Groups]:
    """Train the head alone."""
    named = dict(backbone.model.named_parameters())
    return backbone.model, {"head": {name: named[name] for name in backbone.head}}


METHODS: Mapping[str, Callable[[Backbone, Experiment], tuple[nn.Module, Groups]]] = {
    "full": _full,
    "peft-lora": _peft_lora,
    "head": _head_only,
    "peft-lora-r1": partial(_peft_lora, rank=1),
    "peft-lora-r32": partial(_peft_lora, rank=32),
    "peft-lora-all": partial(_peft_lora, everywhere=True),
    "peft-lora-all-r1": partial(_peft_lora, rank=1, everywhere=True),
    "ffa-lora": partial(_peft_lora, frozen_down=True),
    "supertuning": partial(_supertuning, largest=True),
    "supertuning-bottom": partial(_supertuning, largest=False),
}


def _dense_layers(backbone: Backbone) -> list[str]:
    """Return paths of the dense layers of the blocks."""
    positions = find_target_modules(backbone.model, backbone.head)
    return [p.name for p in positions if p.role in ALL_LINEAR]


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
        if experiment.backbone.head == "keep" and kind_of(data.task).has_head:
            raise ConfigError(
                "a baseline trains the head, and backbone.head is 'keep': take 'train' or 'new'."
            )
        device = check_device(experiment.run.device)
        backbone = load_for_task(experiment.backbone, data.task, device=device)
        settle_padding(backbone.model, data.train)
        self.fingerprint = backbone.fingerprint
        self.origin = backbone.origin
        self.pretrained_parameters = backbone.pretrained_parameters
        self.model, self.groups = METHODS[method](backbone, experiment)
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
