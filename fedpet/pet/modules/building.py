"""Build the modules that a mask and a structure name, to act on a backbone.

In:  the model, a `Mask`'s positions by parameter name, a `Structure`.
Out: the `GatedModule`s, in the order in which their values are communicated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from fedpet.backbone.module_roles import Position
from fedpet.backbone.quantised import QuantisedWeight
from fedpet.errors import StructureError
from fedpet.pet.modules.base import GatedModule, is_dense, is_transposed
from fedpet.pet.modules.bitfit import BitFit
from fedpet.pet.modules.hiwi import HiwiBias
from fedpet.pet.modules.masked_weight import MaskedWeight, MaskedWeights
from fedpet.pet.modules.registry import KINDS
from fedpet.pet.structure import Structure

__all__ = ["build_masked_weights", "build_structure"]


def build_masked_weights(
    model: nn.Module, positions: Mapping[str, Tensor], *, shared: bool = False
) -> MaskedWeights | None:
    """Build the masked weights, in the order of the model; None where there are none.

    Where the weights are `shared` with other processes, they are never written; nor is any where
    some are quantised.

    Raises:
        StructureError: A name that is no weight of a dense module here, or a position outside it.
    """
    parameters = dict(model.named_parameters())
    owners = {id(m.weight): m for m in model.modules() if is_dense(m)}
    for name, chosen in positions.items():
        parameter = parameters.get(name)
        if parameter is None or id(parameter) not in owners:
            raise StructureError(
                f"a mask's names must be weights of dense layers, and {name!r} is none in this "
                "backbone. Build the mask from this backbone."
            )
        if len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < parameter.numel():
            raise StructureError(
                f"a mask's positions must lie inside their weight: those of {name!r} reach "
                f"{int(chosen.max())}, and it has {parameter.numel()} entries. Build the mask "
                "from this backbone."
            )
    shared = shared or any(isinstance(own, QuantisedWeight) for own in parameters.values())
    weights = [
        MaskedWeight(
            name, parameter, positions[name], is_transposed(owners[id(parameter)]), shared=shared
        )
        for name, parameter in parameters.items()
        if name in positions and len(positions[name])
    ]
    return MaskedWeights(weights) if weights else None


def build_structure(
    model: nn.Module, positions: Sequence[Position], structure: Structure, seed: int
) -> list[GatedModule]:
    """Build a `GatedModule` for each spec, in the order of the structure.

    Raises:
        StructureError: A target that is absent, or cannot carry the kind of module.
    """
    kinds: dict[str, set[str]] = {}
    for position in positions:
        kinds.setdefault(position.name, set()).add(position.kind)
    modules = []
    for spec in structure.modules:
        if spec.target not in kinds:
            raise StructureError(
                f"the structure's {spec.kind!r} module acts on {spec.target!r}, which is no "
                "position of this backbone: the structure was made for another one."
            )
        if not kinds[spec.target] & KINDS[spec.kind].targets:
            raise StructureError(
                f"a {spec.kind!r} module must act on one of "
                f"{', '.join(sorted(KINDS[spec.kind].targets))}, and {spec.target!r} is of kind "
                f"{', '.join(sorted(kinds[spec.target]))}."
            )
        modules.append(KINDS[spec.kind].build(spec, model.get_submodule(spec.target), seed))
    _share_bias(modules)
    return modules


def _share_bias(modules: Sequence[GatedModule]) -> None:
    """Send one bias once: a BitFit stores and sends the change of a HiWi adapter beside it.

    Raises:
        StructureError: Two modules of the kind that hold the same bias.
    """
    holders: dict[str, BitFit] = {}
    for module in modules:
        if isinstance(module, BitFit):
            if module.target in holders:
                raise StructureError(
                    f"one module may hold a bias, and 'bitfit' and 'ln-bias' both act on that of "
                    f"{module.target!r}. Leave one out."
                )
            holders[module.target] = module
    for module in modules:
        if isinstance(module, HiwiBias) and module.target in holders:
            module.carried = True
            holders[module.target].adapter = module
