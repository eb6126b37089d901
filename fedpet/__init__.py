"""fedpet: federated parameter-efficient fine-tuning on Flower.

    config, data -> backbone -> pet -> search -> training -> codec -> protocol
                 -> client / server -> run -> report

    import fedpet

    model = fedpet.get_pet_model(base, fedpet.PetConfig(
        mask=fedpet.MaskConfig(density=0.001),
        modules=[fedpet.LoraConfig(r=8, target_modules=["query", "value"])]))

Names are imported when they are first asked for, so that the command line answers `--help`
without waiting for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedpet.codec.encode_decode import decode, encode
    from fedpet.config import MaskConfig
    from fedpet.errors import FedpetError, InputError
    from fedpet.pet.factory import get_pet_model
    from fedpet.pet.mask import Mask, build_mask, pafi_mask
    from fedpet.pet.model import PetModel
    from fedpet.pet.modules.base import GatedModule
    from fedpet.pet.modules.registry import linears, register_module
    from fedpet.pet.pet_config import (
        AdapterConfig,
        BitFitConfig,
        CustomModuleConfig,
        HiwiConfig,
        LayerNormConfig,
        LoraConfig,
        ModuleConfig,
        PetConfig,
    )
    from fedpet.pet.structure import ModuleSpec, Structure
    from fedpet.protocol.ledger import Ledger

__version__ = "0.1.0"

_HOME = {
    "fedpet.codec.encode_decode": ("decode", "encode"),
    "fedpet.config": ("MaskConfig",),
    "fedpet.errors": ("FedpetError", "InputError"),
    "fedpet.protocol.ledger": ("Ledger",),
    "fedpet.pet.mask": ("Mask", "build_mask", "pafi_mask"),
    "fedpet.pet.model": ("PetModel",),
    "fedpet.pet.modules.base": ("GatedModule",),
    "fedpet.pet.modules.registry": ("linears", "register_module"),
    "fedpet.pet.factory": ("get_pet_model",),
    "fedpet.pet.pet_config": (
        "AdapterConfig",
        "BitFitConfig",
        "CustomModuleConfig",
        "HiwiConfig",
        "LayerNormConfig",
        "LoraConfig",
        "ModuleConfig",
        "PetConfig",
    ),
    "fedpet.pet.structure": ("ModuleSpec", "Structure"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "AdapterConfig",
    "BitFitConfig",
    "CustomModuleConfig",
    "FedpetError",
    "GatedModule",
    "HiwiConfig",
    "InputError",
    "LayerNormConfig",
    "Ledger",
    "LoraConfig",
    "Mask",
    "MaskConfig",
    "ModuleConfig",
    "ModuleSpec",
    "PetConfig",
    "PetModel",
    "Structure",
    "__version__",
    "build_mask",
    "decode",
    "encode",
    "get_pet_model",
    "linears",
    "pafi_mask",
    "register_module",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value  # asked for once
    return value


def __dir__() -> list[str]:
    return [*__all__]
