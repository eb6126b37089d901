"""fedpet: federated parameter-efficient fine-tuning on Flower.

    config, data -> backbone -> pet -> search -> training -> codec -> protocol
                 -> client / server -> run -> report

    import fedpet

    model = fedpet.get_pet_model(base, fedpet.PetConfig(
        mask=fedpet.MaskConfig(density=0.001),
        modules=[fedpet.LoraConfig(r=8, target_modules=["query", "value"])]))
    run = fedpet.simulate(model, fedpet.load_federated_dataset(rows, client_column="client"))

Names are imported on first use, so that the command line answers `--help` without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from fedpet.utils.telemetry import turn_off_telemetry

if TYPE_CHECKING:
    from fedpet.client.trainer_script import client_name, client_rows, patch
    from fedpet.codec.encode_decode import decode, encode
    from fedpet.config import Experiment, MaskConfig, SearchConfig, TrainingConfig
    from fedpet.data.collator import register_data_collator
    from fedpet.data.federated_dataset import FederatedDataset, load_federated_dataset
    from fedpet.errors import FedpetError, InputError
    from fedpet.export import export_peft
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
    from fedpet.run.bundled_data import bundled_model, bundled_reviews
    from fedpet.run.callbacks import Callback
    from fedpet.run.finished import Run
    from fedpet.run.simulate import resume, simulate
    from fedpet.search.from_dataset import search_structure
    from fedpet.tasks.task_kind import TaskKind, register_task
    from fedpet.training.auto_rates import auto_learning_rates
    from fedpet.training.loss import register_loss
    from fedpet.training.metrics import register_metric

__version__ = "0.1.0"

turn_off_telemetry()

_HOME = {
    "fedpet.client.trainer_script": ("client_name", "client_rows", "patch"),
    "fedpet.codec.encode_decode": ("decode", "encode"),
    "fedpet.config": ("Experiment", "MaskConfig", "SearchConfig", "TrainingConfig"),
    "fedpet.data.collator": ("register_data_collator",),
    "fedpet.data.federated_dataset": ("FederatedDataset", "load_federated_dataset"),
    "fedpet.errors": ("FedpetError", "InputError"),
    "fedpet.export": ("export_peft",),
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
    "fedpet.run.bundled_data": ("bundled_model", "bundled_reviews"),
    "fedpet.run.callbacks": ("Callback",),
    "fedpet.run.finished": ("Run",),
    "fedpet.run.simulate": ("resume", "simulate"),
    "fedpet.search.from_dataset": ("search_structure",),
    "fedpet.tasks.task_kind": ("TaskKind", "register_task"),
    "fedpet.training.auto_rates": ("auto_learning_rates",),
    "fedpet.training.loss": ("register_loss",),
    "fedpet.training.metrics": ("register_metric",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "AdapterConfig",
    "BitFitConfig",
    "Callback",
    "CustomModuleConfig",
    "Experiment",
    "FederatedDataset",
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
    "Run",
    "SearchConfig",
    "Structure",
    "TaskKind",
    "TrainingConfig",
    "__version__",
    "auto_learning_rates",
    "build_mask",
    "bundled_model",
    "bundled_reviews",
    "client_name",
    "client_rows",
    "decode",
    "encode",
    "export_peft",
    "get_pet_model",
    "linears",
    "load_federated_dataset",
    "pafi_mask",
    "patch",
    "preset_structure",
    "register_data_collator",
    "register_loss",
    "register_metric",
    "register_module",
    "register_task",
    "resume",
    "search_structure",
    "simulate",
]


def __getattr__(name: str) -> Any:
    if name == "strategies":
        return importlib.import_module("fedpet.strategies")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value  # the next access finds it
    return value


def __dir__() -> list[str]:
    return [*__all__, "strategies"]
