"""Implement the PET modules, one a file, behind the interface of `base`."""

from fedpet.pet.modules.adapter import LowRankAdapter
from fedpet.pet.modules.base import GatedModule, PetModule
from fedpet.pet.modules.bitfit import BitFit, NormBias
from fedpet.pet.modules.head import HeadTensor
from fedpet.pet.modules.hiwi import HiwiBias, HiwiWeight
from fedpet.pet.modules.layernorm import LNFit
from fedpet.pet.modules.lora import LoRA, LoRAFactors
from fedpet.pet.modules.masked_weight import MaskedWeight, MaskedWeights

__all__ = [
    "BitFit",
    "GatedModule",
    "HeadTensor",
    "HiwiBias",
    "HiwiWeight",
    "LNFit",
    "LoRA",
    "LoRAFactors",
    "LowRankAdapter",
    "MaskedWeight",
    "MaskedWeights",
    "NormBias",
    "PetModule",
]
