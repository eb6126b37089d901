"""fedpet: federated parameter-efficient fine-tuning on Flower.

    backbone -> mask -> structure -> search -> model -> codec
             -> plan -> client -> strategy -> ledger -> report

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
    from fedpet.config import MaskConfig, SearchConfig, TrainingConfig
    from fedpet.errors import FedpetError, InputError
    from fedpet.pet.factory import get_pet_model, preset_structure
    from fedpet.pet.mask import Mask, build_mask, pafi_mask
    from fedpet.pet.model import PetModel
    from fedpet.pet.modules.adapter import AdapterConfig
    from fedpet.pet.modules.base import GatedModule
    from fedpet.pet.modules.bitfit import BitFitConfig
    from fedpet.pet.modules.hiwi import HiwiConfig
    from fedpet.pet.modules.layernorm import LayerNormConfig
    from fedpet.pet.modules.lora import LoraConfig
    from fedpet.pet.modules.module_config import CustomModuleConfig, ModuleConfig
    from fedpet.pet.modules.registry import ModuleSpec, linears, register_module
    from fedpet.pet.pet_config import PetConfig
    from fedpet.pet.structure import Structure
    from fedpet.protocol.ledger import Ledger
    from fedpet.search.from_dataset import search_structure
    from fedpet.training.loss import register_loss
    from fedpet.training.metrics import register_metric

__version__ = "0.1.0"

_HOME = {
    "fedpet.codec.encode_decode": ("decode", "encode"),
    "fedpet.config": ("MaskConfig", "SearchConfig", "TrainingConfig"),
    "fedpet.errors": ("FedpetError", "InputError"),
    "fedpet.protocol.ledger": ("Ledger",),
    "fedpet.pet.mask": ("Mask", "build_mask", "pafi_mask"),
    "fedpet.pet.model": ("PetModel",),
    "fedpet.pet.modules.base": ("GatedModule",),
    "fedpet.pet.modules.registry": ("ModuleSpec", "linears", "register_module"),
    "fedpet.pet.factory": ("get_pet_model", "preset_structure"),
    "fedpet.pet.modules.adapter": ("AdapterConfig",),
    "fedpet.pet.modules.bitfit": ("BitFitConfig",),
    "fedpet.pet.modules.hiwi": ("HiwiConfig",),
    "fedpet.pet.modules.layernorm": ("LayerNormConfig",),
    "fedpet.pet.modules.lora": ("LoraConfig",),
    "fedpet.pet.modules.module_config": ("CustomModuleConfig", "ModuleConfig"),
    "fedpet.pet.pet_config": ("PetConfig",),
    "fedpet.pet.structure": ("Structure",),
    "fedpet.search.from_dataset": ("search_structure",),
    "fedpet.training.loss": ("register_loss",),
    "fedpet.training.metrics": ("register_metric",),
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
    "SearchConfig",
    "Structure",
    "TrainingConfig",
    "__version__",
    "build_mask",
    "decode",
    "encode",
    "get_pet_model",
    "linears",
    "pafi_mask",
    "preset_structure",
    "register_loss",
    "register_metric",
    "register_module",
    "search_structure",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value  # asked for once
    return value


def __dir__() -> list[str]:
    return [*__all__]
