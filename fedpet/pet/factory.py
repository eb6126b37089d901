"""Build a `PetModel` from a user's own model and a `PetConfig`.

In:  a transformer of any architecture, as transformers or torch made it.
Out: the same object, wrapped: what the configuration names trains, all else is frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from fedpet.backbone.classifier import outside_base
from fedpet.backbone.module_roles import find_target_modules, maskable_weights
from fedpet.backbone.pretrained import Backbone
from fedpet.errors import ConfigError, StructureError
from fedpet.pet.mask import build_mask
from fedpet.pet.model import PetModel
from fedpet.pet.structure import Structure, preset
from fedpet.pet.trainable_model import check_plain

if TYPE_CHECKING:
    from fedpet.pet.pet_config import PetConfig

__all__ = ["get_pet_model", "preset_structure", "trained_in_full"]

# What a class is called whose head a checkpoint of the encoder lacks.
_NEW_HEADS = ("Classification", "Regression", "QuestionAnswering", "MultipleChoice")


def get_pet_model(model: nn.Module, config: PetConfig) -> PetModel:
    """Make what `config` names the trainable part of a model.

    Args:
        model: A transformer in float32, on any device. It is adapted in place and frozen but for
            its trainables; `merge_and_unload()` and `unload()` give it back.
        config: Mask, modules, and what is trained in full.

    Returns:
        An `nn.Module` that is called as the model is. Train it with `transformers.Trainer` or any
        loop and optimiser over its `parameters()`.

    Raises:
        BackboneError: A model that is adapted already, or of a type other than float32.
        ConfigError: The configuration leaves nothing to train.
        StructureError: `target_modules` or `modules_to_save` name nothing in this model.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> small = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        ...                    intermediate_size=64, vocab_size=50)
        >>> base = BertForSequenceClassification(small)
        >>> model = get_pet_model(base, PetConfig(
        ...     mask=MaskConfig(density=0.001),
        ...     modules=[LoraConfig(r=2, target_modules=["query", "value"]), LayerNormConfig()]))
        >>> model.print_trainable_parameters()
        trainable params: 595 || all params: 36,578 || trainable%: 1.6267
        upload a round (float32): 2,380 bytes || dense FedAvg: 145,288 bytes || upload%: 1.6381
        >>> [name for name, _ in model.named_parameters()][:2]
        ['trainable.mask', 'trainable.lora']
    """
    check_plain(model)
    head = trained_in_full(model, config.modules_to_save)
    structure = config.structure(find_target_modules(model, head))
    if config.mask is None and structure == Structure() and not head:
        raise ConfigError(
            "a PetConfig must name something to train: a mask, modules or modules_to_save."
        )
    mask, masked = None, config.mask_of(structure)
    if masked is not None:
        mask = build_mask(maskable_weights(model, head), masked, structure.mask)
    backbone = Backbone.of_model(model, head)
    return PetModel(backbone, mask, structure, seed=config.seed, mask_config=masked)


def preset_structure(
    model: nn.Module, names: str, *, rank: int = 8, scale: float = 2.0
) -> Structure:
    """Name the modules of presets in a model.

    Args:
        model: A transformer; its weights are not read.
        names: Of registered kinds and presets, joined by "+": "lnfit+lora".
        rank: Of the modules that have one.
        scale: Of LoRA: what alpha / rank is elsewhere.

    Raises:
        StructureError: An unknown name, or one that finds nothing to act on in this model.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> small = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        ...                    intermediate_size=64, vocab_size=50)
        >>> found = preset_structure(BertForSequenceClassification(small), "lora", rank=2)
        >>> [(spec.kind, spec.target, spec.rank) for spec in found.modules][:1]
        [('lora', 'bert.encoder.layer.0.attention.self.query', 2)]
        >>> Structure.from_json(found.to_json()) == found
        True
    """
    positions = find_target_modules(model, trained_in_full(model, None))
    return preset(names, positions, rank=rank, scale=scale)


def trained_in_full(model: nn.Module, modules_to_save: Sequence[str] | None) -> tuple[str, ...]:
    """Name the parameters that train in full.

    Args:
        model: A transformer.
        modules_to_save: As in `PetConfig`.

    Raises:
        StructureError: A name that fits no module with parameters.
    """
    names = [name for name, _ in model.named_parameters()]
    if modules_to_save is None:
        is_new = any(word in type(model).__name__ for word in _NEW_HEADS)
        outside = outside_base(model)
        return outside if is_new and len(outside) < len(names) else ()
    modules = [name for name, _ in model.named_modules() if name]
    chosen: set[str] = set()
    for wanted in modules_to_save:
        found = [name for name in modules if f".{name}".endswith(f".{wanted}")]
        fitting = {n for n in names for module in found if n.startswith(f"{module}.")}
        if not fitting:
            raise StructureError(
                f"modules_to_save must name modules with parameters, and {wanted!r} fits none. "
                f"Beside the encoder this model has "
                f"{', '.join(name for name, _ in model.named_children())}."
            )
        chosen |= fitting
    return tuple(name for name in names if name in chosen)
