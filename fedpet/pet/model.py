"""Hold a model with its trainables: count, copy, move, merge and save it.

In:  a backbone, a mask (or none), a structure, and the seed of what is drawn.
Out: a `PetModel`, an `nn.Module` that any loop trains and that merges to a plain model. How it is
     adapted and where its values lie: `fedpet/pet/trainable_model.py`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from fedpet.backbone.quantised import dequantise
from fedpet.pet.layers.flat_parameters import unpin
from fedpet.pet.pet_files import load_pet, save_pet
from fedpet.pet.trainable_model import TrainableModel, check_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fedpet.backbone.pretrained import Backbone
    from fedpet.config import MaskConfig
    from fedpet.pet.mask import Mask
    from fedpet.pet.structure import Structure

__all__ = ["PetModel"]


class PetModel(TrainableModel):
    """A transformer whose trainables are a mask, small modules and a head.

    Train it with `transformers.Trainer` or any loop over `parameters()`, which are the trainables:
    one flat parameter a kind of module. Its forward and attributes are those of the model inside.

    Attributes:
        model: The adapted model. `merge_and_unload` and `unload` make it a plain one again.
        trainable: The trainables by kind of module.
        tiers: The layout of the values of each tier of devices, weakest first; of all last.
        segments: The layout in use.
        num_values: How many values are communicated, in the layout in use.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> small = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        ...                    intermediate_size=64, vocab_size=50)
        >>> model = get_pet_model(
        ...     BertForSequenceClassification(small), PetConfig(modules=[LayerNormConfig()]))
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        >>> ids, labels = torch.tensor([[2, 7, 9, 3], [2, 8, 4, 3]]), torch.tensor([0, 1])
        >>> for step in range(3):
        ...     loss = model(input_ids=ids, labels=labels).loss
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        >>> delta = model.get_delta()
        >>> delta.shape == (model.num_values,), bool(delta.any())
        (True, True)
        >>> model.set_delta(0.5 * delta)
        >>> type(model.merge_and_unload()).__name__
        'BertForSequenceClassification'
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move to a device or a type; an optimiser made before keeps its parameters."""
        flat = self._storage.flat
        probe = fn(flat[:0])
        if (probe.dtype, probe.device) == (flat.dtype, flat.device):
            return self
        check_dtype("a PetModel", probe.dtype)
        with self._plain():
            self.model._apply(fn)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> PetModel:
        """Copy it, model and all, at the point where it is."""
        make, parts = self.__reduce__()
        memo[id(self)] = twin = make(*parts)
        return twin

    def __reduce__(self) -> tuple[Callable[..., PetModel], tuple[Any, ...]]:
        """Return the plain model, and what to put on it: for pickle and torch.save."""
        point = self._point()
        with self._plain():
            backbone = dataclasses.replace(self._backbone, model=copy.deepcopy(self.model))
        made_of = (self._chosen, self.structure, self.seed, self._products, self.mask_config)
        return _made_of, (backbone, *made_of, point)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Count the parameters that train, and all, as peft counts them."""
        trained = sum(group.numel() for group in self.parameters())
        beside = sum(
            trainable.numel()
            for module in self._pet_modules
            if module.place != "mask" and not (module.as_leaf and module.pretrained is not None)
            for trainable in module.trainables
        )
        return trained, self._num_dense + beside

    @property
    def _num_dense(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def print_trainable_parameters(self) -> None:
        """Print peft's line, and what a client uploads a round against FedAvg of all parameters."""
        trained, everything = self.get_nb_trainable_parameters()
        dense = self._num_dense
        print(
            f"trainable params: {trained:,d} || all params: {everything:,d} || "
            f"trainable%: {100 * trained / everything:.4f}\n"
            f"upload a round (float32): {4 * self.num_values:,d} bytes || dense FedAvg: "
            f"{4 * dense:,d} bytes || upload%: {100 * self.num_values / dense:.4f}"
        )

    @torch.no_grad()
    def merged(self) -> PreTrainedModel:
        """Return a plain model with every change folded in, a copy that shares no memory.

        Names, shapes, classes and the module tree are the pretrained model's, but for what
        `added_parameters` lists. Quantised weights are plain ones of the model's type there.
        """
        self._storage.refresh()
        self._hook.remove()
        try:
            plain: PreTrainedModel = copy.deepcopy(self.model)
        finally:
            self._hook = self._storage.hook(self.model)
        for site in self._sites:
            plain.get_submodule(site.name).__dict__.pop("forward", None)
        dequantise(plain)
        for name, dtype in self._storage.plain_dtypes.items():
            parameter = plain.get_parameter(name)
            parameter.data = parameter.data.to(dtype)
        if self._mask is not None:
            self._mask.merge_into(plain)
        for module in self._structure:
            module.merge(plain.get_submodule(module.target))
        for parameter in plain.parameters():
            unpin(parameter)
        return plain

    @torch.no_grad()
    def merge_and_unload(self) -> PreTrainedModel:
        """Fold every change into the model and give it back; this object is done.

        Unlike `merged` it copies nothing: what comes back is the object that was adapted, a plain
        model of its own class.
        """
        self._storage.refresh()
        self._hook.remove()
        for site in self._sites:
            site.remove()
        dequantise(self.model)
        if self._mask is not None:
            self._mask.merge_into(self.model)
        self._storage.release(merged=True)
        for module in self._structure:
            module.merge(self.model.get_submodule(module.target))
        return self.model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the trainables alone, see fedpet/pet/pet_files.py: a few MB at most.

        Args:
            folder: Made, where it is absent.
        """
        save_pet(self, Path(folder))

    @classmethod
    def from_pretrained(cls, model: nn.Module, folder: str | Path) -> PetModel:
        """Put what `save_pretrained` wrote on a model again, which is adapted in place.

        Args:
            model: The backbone that they were trained on, as its checkpoint has it. Its head may
                be drawn anew: the saved one stands in its place.
            folder: Written by `save_pretrained`.

        Raises:
            BackboneError: Another backbone.
            InputError: No such folder.
        """
        return load_pet(cls, model, Path(folder))


def _made_of(
    backbone: Backbone,
    mask: Mask | None,
    structure: Structure,
    seed: int,
    products: str,
    mask_config: MaskConfig | None,
    point: tuple[int, Tensor, Tensor],
) -> PetModel:
    """Undo `PetModel.__reduce__`."""
    pet = PetModel(backbone, mask, structure, seed=seed, products=products, mask_config=mask_config)
    pet._go_to(*point)
    return pet
