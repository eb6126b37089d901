"""Write the trainables of a model as an adapter of peft, where peft can express them.

    what trains                          what peft calls it
    LoRA, exact or both factors          LORA: A and B; biases of dense layers by `bias="all"`
    HiWi on weights                      LORA too: it is a change of low rank
    biases of dense layers alone         BEFT
    a mask, with LoRA or without         SUPERTUNING: positions and values of each dense weight
    norms alone                          LN_TUNING
    norms and the head, beside those     `modules_to_save`

SUPERTUNING has as many entries in each weight, relative to its size, and LoRA of one rank in each:
what a weight has fewer of is filled up with entries that are zero. All else is refused.

The files are written without peft, which reads them: `adapter_config.json` holds what differs from
peft's defaults, `adapter_model.safetensors` the tensors by peft's names.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from fedpet.backbone.checkpoint import package_name
from fedpet.backbone.module_roles import is_dense
from fedpet.errors import ConfigError
from fedpet.export.model_card import hub_name, write_adapter_card
from fedpet.export.plain_model import no_room
from fedpet.pet.modules.base import is_transposed
from fedpet.pet.modules.lora import LowRankBranch
from fedpet.utils.paths import expand

if TYPE_CHECKING:
    from fedpet.pet.model import PetModel

__all__ = ["CONFIG_FILE", "TENSORS_FILE", "check_expressible", "export_peft", "write_adapter"]

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# How peft names the tasks, by the end of a model's class.
_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}
_NEEDS = "It needs peft 0.21.2 or newer."
_INSTEAD = "Write the whole model instead: --format merged, or merge_and_unload() in Python."


def export_peft(model: PetModel, folder: str | Path) -> str:
    """Write a model's trainables as an adapter of peft, with a model card.

    Args:
        model: Stays as it is.
        folder: Made where it is absent.

    Returns:
        The adapter's type: "LORA", "SUPERTUNING", "BEFT" or "LN_TUNING".

    Raises:
        ConfigError: peft cannot express what trains; the message says what, and what to do.
        RunError: The disk does not take it.

    Example:
        >>> import tempfile
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> small = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        ...                    intermediate_size=64, vocab_size=50)
        >>> model = get_pet_model(
        ...     BertForSequenceClassification(small), PetConfig(modules=[LoraConfig(r=2)]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_peft(model, folder)
        'LORA'
    """
    folder = expand(folder)
    peft_type, notes = write_adapter(model, folder, model.source)
    write_adapter_card(folder, model.source, peft_type=peft_type, notes=notes)
    return peft_type


def write_adapter(pet: PetModel, folder: Path, source: str) -> tuple[str, Sequence[str]]:
    """Write an adapter's two files.

    Args:
        pet: Stays as it is.
        folder: Made where it is absent.
        source: The checkpoint, as the user named it.

    Returns:
        peft's type of adapter, and what whoever loads it must know.

    Raises:
        ConfigError: peft cannot express what trains.
        RunError: The disk does not take it.
    """
    adapter = _adapter_of(pet)
    config = {
        **adapter.config,
        "base_model_name_or_path": _base(pet, source),
        "inference_mode": True,
        "modules_to_save": sorted(adapter.whole) or None,
        "task_type": _task_type(type(pet.model).__name__),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            _PREFIX + name: t.detach().cpu().contiguous().clone()
            for name, t in adapter.tensors.items()
        }
        save_file(tensors, folder / TENSORS_FILE, metadata={"format": "pt"})
        text = json.dumps(config, indent=2, sort_keys=True)
        (folder / CONFIG_FILE).write_text(f"{text}\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise no_room(folder, error) from None
    return adapter.config["peft_type"], adapter.notes


def check_expressible(pet: PetModel) -> None:
    """Refuse a model whose trainables are no adapter of peft, before it is trained.

    Raises:
        ConfigError: peft cannot express what trains; the message says what, and what to do.
    """
    _adapter_of(pet)


def _base(pet: PetModel, source: str) -> str | None:
    """Return what `from_pretrained` finds the checkpoint by: its name on the hub, else a folder."""
    folder = getattr(getattr(pet.model, "config", None), "_name_or_path", "")
    package = package_name(source)
    return hub_name(source) or (folder if package else source) or None


@dataclass
class _Adapter:
    """Collect the parts of an adapter.

    Attributes:
        config: As peft reads it.
        whole: Paths of modules that are saved as they are.
        tensors: By peft's names.
        notes: In sentences.
    """

    config: dict[str, Any] = field(default_factory=dict)
    whole: set[str] = field(default_factory=set)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@torch.no_grad()
def _adapter_of(pet: PetModel) -> _Adapter:
    plain = pet.merged()
    loras: dict[str, LowRankBranch] = {}
    biases: dict[str, list[Tensor]] = {}
    norms: list[str] = []
    refused: list[str] = []
    for module in pet.structure_modules:
        target, before = (model.get_submodule(module.target) for model in (plain, pet.model))
        if isinstance(module, LowRankBranch):
            loras[module.target] = module
        elif module.added_parameters or type(target) is not type(before):
            refused.append(f"{module.kind} on {module.target!r}, which adds to the model's own")
        elif not is_dense(target):
            norms.append(module.target)
        elif module.place == "bias":
            biases.setdefault(module.target, []).append(module.gated(None))
        else:
            refused.append(f"{module.kind} on {module.target!r}")
    if refused:
        raise _beyond_peft(f"{_listed(refused)} is no form of adapter that peft has")
    adapter = _Adapter()
    mask = _mask_values(pet)
    if mask:
        _supertuning(adapter, pet, mask, loras, biases)
    elif loras:
        _lora(adapter, plain, loras, biases)
    elif biases:
        _refuse_others("BEFT, which biases alone would be,", plain, biases)
        adapter.config = {"peft_type": "BEFT", "target_modules": sorted(biases)}
        adapter.notes.append(_NEEDS)
        for name, changes in biases.items():
            adapter.tensors[f"{name}.beft_bias"] = torch.stack(changes).sum(dim=0)[None]
    elif norms:
        adapter.config = {"peft_type": "LN_TUNING", "target_modules": sorted(set(norms))}
    else:
        raise _beyond_peft("only the head trains, which peft saves beside an adapter alone")
    adapter.whole |= _head_modules(pet)
    for name in dict.fromkeys(norms):
        layers = f"{name}.ln_tuning_layers" if adapter.config["peft_type"] == "LN_TUNING" else name
        if layers == name:
            adapter.whole.add(name)
        else:
            _save_whole(adapter, plain, name, layers)
    for name in adapter.whole:
        _save_whole(adapter, plain, name, name)
    return adapter


def _save_whole(adapter: _Adapter, plain: nn.Module, name: str, stored_as: str) -> None:
    for key, tensor in plain.get_submodule(name).state_dict().items():
        adapter.tensors[f"{stored_as}.{key}"] = tensor


def _lora(
    adapter: _Adapter, plain: nn.Module, loras: Mapping[str, LowRankBranch], biases: Iterable[str]
) -> None:
    """Write LORA: rank and scale by module, where they are not all alike."""
    ranks, alphas = {}, {}
    for target, lora in loras.items():
        down, up = lora.factors()
        ranks[target], alphas[target] = len(down), lora.scale * len(down)
        adapter.tensors[f"{target}.lora_A.weight"] = down
        adapter.tensors[f"{target}.lora_B.weight"] = up
    rank, alpha = max(ranks.values()), max(alphas.values())
    adapter.config = {
        "peft_type": "LORA",
        "target_modules": sorted(loras),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "rank_pattern": {name: own for name, own in ranks.items() if own != rank},
        "alpha_pattern": {name: own for name, own in alphas.items() if own != alpha},
        "bias": "all" if biases else "none",
        "fan_in_fan_out": all(is_transposed(plain.get_submodule(name)) for name in loras),
    }
    for name in biases:
        bias = plain.get_submodule(name).bias
        assert isinstance(bias, Tensor)
        adapter.tensors[f"{name}.base_layer.bias" if name in loras else f"{name}.bias"] = bias


def _supertuning(
    adapter: _Adapter,
    pet: PetModel,
    mask: Mapping[str, tuple[Tensor, Tensor]],
    loras: Mapping[str, LowRankBranch],
    biases: Collection[str],
) -> None:
    """Write SUPERTUNING: the mask, filled up to one density; LoRA, filled up to one rank."""
    if biases:
        raise _beyond_peft(
            f"peft's SUPERTUNING, which a mask would be, has no place for the bias of "
            f"{next(iter(biases))!r}, nor has its LoRA for a mask"
        )
    targets = {name: pet.model.get_submodule(name) for name in sorted({*mask, *loras})}
    _refuse_others("SUPERTUNING, which a mask would be,", pet.model, targets)
    sizes = {name: _weight(module).numel() for name, module in targets.items()}
    wanted = {name: len(mask[name][0]) if name in mask else 0 for name in targets}
    sparsity = _sparsity([(sizes[name], max(wanted[name], 1)) for name in targets])
    rank = max((len(lora.factors()[0]) for lora in loras.values()), default=0)
    empty = (torch.empty(0, dtype=torch.int64), torch.empty(0))
    added = 0
    for name, module in targets.items():
        positions, values = mask.get(name, empty)
        count = _entries(sizes[name], sparsity)
        missing = count - len(positions)
        is_free = torch.ones(sizes[name], dtype=torch.bool)
        is_free[positions] = False
        filling = is_free.nonzero().flatten()[:missing]
        adapter.tensors[f"{name}.supertuning_indices"] = torch.cat([positions, filling]).int()
        adapter.tensors[f"{name}.supertuning_values"] = torch.cat([values, torch.zeros(missing)])
        added += missing
        if rank:
            width_out, width_in = _weight(module).shape
            down, up = torch.zeros(rank, width_in), torch.zeros(width_out, rank)
            if name in loras:
                own_down, own_up = loras[name].factors()
                down[: len(own_down)] = own_down
                up[:, : len(own_down)] = loras[name].scale * own_up
            adapter.tensors[f"{name}.supertuning_lora_A.weight"] = down
            adapter.tensors[f"{name}.supertuning_lora_B.weight"] = up
    adapter.config = {
        "peft_type": "SUPERTUNING",
        "target_modules": [*targets],
        "sparsity": sparsity,
        "r": rank or None,
        "lora_alpha": rank or None,  # the scale is in B
        "save_precomputed_indices": True,
        "select_top": pet.mask_config is not None and pet.mask_config.rule == "largest",
    }
    adapter.notes.append(_NEEDS)
    if added:
        total = sum(wanted.values())
        adapter.notes.append(
            f"peft's SUPERTUNING has one density for all weights, so {added:,} entries that are "
            f"zero stand beside the {total:,} that were trained."
        )
    if rank and len(loras) < len(targets):
        adapter.notes.append(
            f"Its LoRA of rank {rank} is zero on {len(targets) - len(loras)} of the "
            f"{len(targets)} layers."
        )


def _refuse_others(adapter: str, model: nn.Module, targets: Iterable[str]) -> None:
    """Refuse targets of an adapter that acts on `nn.Linear` alone."""
    for name in targets:
        if not isinstance(module := model.get_submodule(name), nn.Linear):
            raise _beyond_peft(
                f"peft's {adapter} acts on torch.nn.Linear alone, and {name!r} is a "
                f"{type(module).__name__}"
            )


def _mask_values(pet: PetModel) -> dict[str, tuple[Tensor, Tensor]]:
    """Return positions and changes of the mask, by the path of the module they are in."""
    if pet.mask is None:
        return {}
    delta = pet.get_delta()
    found = {}
    for segment in pet.segments:
        if segment.kind == "mask":
            changes = delta[segment.start : segment.start + segment.size]
            positions = pet.mask.positions[segment.name][: segment.size].cpu()
            found[segment.name.removesuffix(".weight")] = (positions, changes)
    return found


def _sparsity(weights: Sequence[tuple[int, int]]) -> float:
    """Return the greatest sparsity, up to rounding, that leaves each size its least entries."""
    sparsity = max(1.0 - max(least / size for size, least in weights), 0.0)
    step = 2.0**-52
    while sparsity > 0 and any(_entries(size, sparsity) < least for size, least in weights):
        sparsity, step = max(sparsity - step, 0.0), 2 * step
    return sparsity


def _entries(size: int, sparsity: float) -> int:
    """Count the entries of a weight as peft does."""
    return int(size * (1 - sparsity))


def _head_modules(pet: PetModel) -> set[str]:
    """List the outermost modules that hold parameters of the head and no others."""
    head = set(pet.head)
    found: set[str] = set()
    for path, module in pet.model.named_modules():
        inside = {f"{path}.{name}" for name, _ in module.named_parameters()}
        is_new = not any(path.startswith(f"{outer}.") for outer in found)
        if path and inside and inside <= head and is_new:
            found.add(path)
    covered = {name for name in head if any(name.startswith(f"{path}.") for path in found)}
    if left := sorted(head - covered):
        raise _beyond_peft(f"peft saves modules, and {left[0]!r} stands in none of the head's own")
    return found


def _task_type(model_class: str) -> str | None:
    return next((task for end, task in _TASKS.items() if model_class.endswith(end)), None)


def _weight(module: nn.Module) -> Tensor:
    assert isinstance(module.weight, Tensor)
    return module.weight


def _beyond_peft(reason: str) -> ConfigError:
    return ConfigError(f"this cannot be written as an adapter of peft: {reason}. {_INSTEAD}")


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"
