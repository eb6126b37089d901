"""Turn a model at hand into what an experiment names: a checkpoint's folder and its settings.

In:  a `PetModel`, a transformers model, or a checkpoint's name; and a `PetConfig`.
Out: tables of an experiment. A model in memory is written to the cache under the hash of its
     weights, with its tokeniser, so that workers and a resumed run load the same one.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from fedpet.backbone.classifier import generates, outside_base
from fedpet.backbone.module_roles import find_target_modules, maskable_weights
from fedpet.backbone.pretrained import fingerprint, load_backbone, load_for_task, locate
from fedpet.config import BackboneConfig, MaskConfig
from fedpet.data.content_folder import hash_folder, store_folder
from fedpet.data.processors import has_processor, save_reader
from fedpet.data.tokenize import hash_tokenizer, load_tokenizer
from fedpet.errors import BackboneError, ConfigError, FedpetError
from fedpet.pet.factory import trained_in_full
from fedpet.pet.layout import layout_hash
from fedpet.pet.model import PetModel
from fedpet.pet.pet_config import PetConfig
from fedpet.pet.structure import Structure
from fedpet.pet.trainable_model import check_plain
from fedpet.run.prepare import Prepared, PreparedSearch
from fedpet.search.from_dataset import task_of_model
from fedpet.utils.atomic_write import atomic_write

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ModelInput", "read_model", "structure_table"]

Check = Callable[[Prepared | PreparedSearch], None]


@dataclass(frozen=True)
class ModelInput:
    """A model as an experiment names it.

    Attributes:
        tables: Of the experiment: backbone, mask, structure, and the seed of what is drawn.
        check: Compares what was prepared with the model in memory.
    """

    tables: dict[str, dict[str, Any]]
    check: Check | None = None


@dataclass(frozen=True)
class _Trainables:
    """The trainable part of a model.

    Attributes:
        mask_config: None for no mask.
        structure: The small modules.
        seed: Of what is drawn.
        head: Parameters that train in full.
    """

    mask_config: MaskConfig | None
    structure: Structure
    seed: int
    head: tuple[str, ...]

    def tables(self, cache: Path) -> dict[str, dict[str, Any]]:
        config = self.mask_config
        mask = {"enabled": False} if config is None else asdict(config)
        return {
            "run": {"seed": self.seed},
            "mask": {key: list(v) if isinstance(v, tuple) else v for key, v in mask.items()},
            "structure": structure_table(self.structure, cache),
        }


def structure_table(structure: Structure, cache: Path) -> dict[str, Any]:
    """Return the table [structure] of a structure in memory, which is written to the cache."""
    if not structure.modules and structure.mask is None:
        return {"preset": "none"}
    text = structure.to_json().encode()
    folder = store_folder(
        cache / "structures", lambda place: atomic_write(place / "structure.json", text)
    )
    return {"file": str((folder / "structure.json").absolute())}


def read_model(
    model: PetModel | nn.Module | str | Path,
    pet_config: PetConfig | None,
    tokenizer: Any,
    cache: Path,
) -> ModelInput:
    """Turn a model and what trains of it into tables of an experiment.

    Args:
        model: A `PetModel`, whose values the run starts from; a plain model that classifies
            sequences or models language; or a checkpoint's name. It stays as it is.
        pet_config: What trains of a plain model or a checkpoint; None leaves that to settings.
        tokenizer: Of the model; None takes the one beside its checkpoint.
        cache: Root of the cache.

    Raises:
        BackboneError: A model that a run cannot start from.
        ConfigError: Trainables that an experiment has no words for.
    """
    if isinstance(model, PetModel):
        if pet_config is not None:
            raise ConfigError("a PetModel has its PetConfig already: leave pet_config out.")
        return _of_pet_model(model, tokenizer, cache)
    if isinstance(model, str | Path):
        tables = {"backbone": {"model": str(model)}}
        if tokenizer is not None and not isinstance(tokenizer, str | Path):
            _check_same_tokenizer(str(model), tokenizer)
        if pet_config is not None:
            loaded = load_backbone(BackboneConfig(model=str(model)), num_outputs=2).model
            tables |= _join(tables, _trainables(loaded, pet_config).tables(cache))
        return ModelInput(tables)
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise BackboneError(
            "a model must be a PetModel, a transformers model or a checkpoint's name, got "
            f"{type(model).__name__}."
        )
    check_plain(model)
    tables = {"backbone": _store(model, tokenizer, cache)}
    head = _head_of(model)
    if pet_config is not None:
        trainables = _trainables(model, pet_config)
        tables, head = _join(tables, trainables.tables(cache)), trainables.head
        tables["backbone"]["head"] = _head_key(model, head, head)
    starts = {name: model.get_parameter(name).detach().cpu().clone() for name in head}
    return ModelInput(tables, lambda prepared: _check_head(prepared, starts, model))


def _of_pet_model(pet: PetModel, tokenizer: Any, cache: Path) -> ModelInput:
    if pet.mask is not None and pet.mask_config is None:
        raise ConfigError(
            "the PetModel has a mask without a MaskConfig, and every client must compute the same "
            "one: make the model by get_pet_model with PetConfig(mask=MaskConfig(...))."
        )
    base: nn.Module = copy.deepcopy(pet).unload()
    starts = {name: start.cpu().clone() for name, start in pet.head_starts().items()}
    trainables = _Trainables(pet.mask_config, pet.structure, pet.seed, tuple(starts))
    tables = _join({"backbone": _store(base, tokenizer, cache)}, trainables.tables(cache))
    tables["backbone"]["head"] = _head_key(base, tuple(starts), pet.head)
    if pet.get_delta().any():
        place = store_folder(cache / "starts", pet.save_pretrained)
        tables["run"]["start"] = str(place.absolute())
    num_values, layout = pet.num_values, layout_hash(pet.tiers)

    def check(prepared: Prepared | PreparedSearch) -> None:
        _check_head(prepared, starts, base)
        if isinstance(prepared, Prepared) and (
            prepared.plan.num_values != num_values or prepared.plan.layout != layout
        ):
            raise ConfigError(
                f"the PetModel has {num_values} values to communicate and the run's plan "
                f"{prepared.plan.num_values}, laid out in another way: leave settings of mask, "
                "structure and head to the PetConfig."
            )

    return ModelInput(tables, check)


def _trainables(model: nn.Module, config: PetConfig) -> _Trainables:
    """Return what a PetConfig trains of a plain model, which stays as it is."""
    head = trained_in_full(model, config.modules_to_save)
    structure = config.structure(find_target_modules(model, head))
    return _Trainables(config.mask_of(structure), structure, config.seed, head)


def _head_of(model: nn.Module) -> tuple[str, ...]:
    """Name the parameters of a plain model's head; a language model has none."""
    return () if generates(model) else outside_base(model)


def _head_key(model: nn.Module, trained: tuple[str, ...], untouched: tuple[str, ...]) -> str:
    """Return `backbone.head` for what trains in full of a model.

    Args:
        model: Plain.
        trained: Names of what trains in full.
        untouched: Names of the head: no mask and no module acts on them.
    """
    head = _head_of(model)
    if set(trained) == set(head):
        return "train"
    if not trained and set(maskable_weights(model, untouched)) == set(
        maskable_weights(model, head)
    ):
        return "keep"
    raise ConfigError(
        "a run trains the whole head of its model or none of it, and the PetConfig trains "
        f"{', '.join(trained) or 'nothing'} of {', '.join(head)} in full: leave modules_to_save "
        "out."
    )


def _check_head(
    prepared: Prepared | PreparedSearch, starts: Mapping[str, Tensor], model: nn.Module
) -> None:
    """Refuse a head that does not fit the rows' classes: it would be drawn anew.

    Raises:
        ConfigError: It tells both sides' classes.
    """
    if not isinstance(prepared, Prepared):
        return
    found = {name: start.cpu() for name, start in prepared.pet.head_starts().items()}
    if found.keys() == starts.keys() and all(torch.equal(found[n], starts[n]) for n in starts):
        return
    theirs = getattr(model.config, "id2label", None) or {}
    names = prepared.data.task.label_names
    raise ConfigError(
        f"the model's head has the classes {list(theirs.values())} and the rows have "
        f"{list(names) or 'numbers'}: load the model with num_labels={max(len(names), 1)}, and "
        "with id2label in the rows' order where it names classes."
    )


def _store(model: nn.Module, tokenizer: Any, cache: Path) -> dict[str, Any]:
    """Return the table [backbone] of a model in memory, which is written where need be."""
    source = str(getattr(model.config, "_name_or_path", "") or "")
    reader = _tokenizer_of(source, tokenizer)
    if _is_checkpoint(source, model, tokenizer):
        return {"model": str(Path(source).expanduser().absolute())}
    plain = cast("PreTrainedModel", model)
    words = store_folder(cache / "tokenizers", lambda place: reader.save_pretrained(place))
    settings = json.dumps(plain.config.to_diff_dict(), sort_keys=True, default=str)
    parts = (fingerprint(plain.named_parameters()), settings, hash_folder(words))

    def fill(folder: Path) -> None:
        plain.save_pretrained(folder)
        reader.save_pretrained(folder)

    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return {"model": str(store_folder(cache / "models", fill, key=key).absolute())}


@dataclass(frozen=True)
class _Reader:
    """Save what reads images or speech as a processor of transformers does itself."""

    checkpoint: Path

    def save_pretrained(self, folder: Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_reader(self.checkpoint, Path(folder))


def _tokenizer_of(source: str, tokenizer: Any) -> Any:
    """Return the tokeniser: as given, by its name, or as it lies beside the checkpoint."""
    if tokenizer is not None and not isinstance(tokenizer, str | Path):
        return tokenizer
    name = str(tokenizer or source)
    try:
        if not name:
            raise BackboneError("the model names no checkpoint.")
        folder = locate(BackboneConfig(model=name))
        return _Reader(folder) if has_processor(folder) else load_tokenizer(folder)
    except FedpetError as error:
        raise BackboneError(
            f"no tokeniser goes with the model ({error}) Give it as "
            "load_federated_dataset(..., tokenizer=...)."
        ) from None


def _is_checkpoint(source: str, model: nn.Module, tokenizer: Any) -> bool:
    """Compare a model with the folder it was loaded from: are all weights there, the head's too."""
    folder = Path(source).expanduser()
    if not source or not folder.is_dir():
        return False
    if tokenizer is not None and str(getattr(tokenizer, "name_or_path", tokenizer)) != source:
        return False
    try:
        loaded = load_for_task(BackboneConfig(model=source), task_of_model(model))
    except BackboneError:
        return False
    if loaded.origin.drawn:
        return False
    return fingerprint(loaded.model.named_parameters()) == fingerprint(model.named_parameters())


def _check_same_tokenizer(model: str, tokenizer: Any) -> None:
    """Refuse a tokeniser that is another than the named checkpoint's."""
    folder = locate(BackboneConfig(model=model))
    theirs = load_tokenizer(folder)
    if tokenizer.get_vocab() != theirs.get_vocab():
        raise ConfigError(
            f"the tokenizer given has another vocabulary than the one beside {model!r} "
            f"({hash_tokenizer(folder):.12}): leave it out, or give the model as an object."
        )


def _join(
    first: Mapping[str, Mapping[str, Any]], second: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Both sides' tables; where both have a key, the second's value."""
    return {name: {**first.get(name, {}), **second.get(name, {})} for name in {**first, **second}}
