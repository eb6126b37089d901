"""The PET modules, one a file, behind the interface of `base`."""

from fedpet.modules.adapter import LowRankAdapter
from fedpet.modules.base import GatedModule, PetModule
from fedpet.modules.bitfit import BitFit, NormBias
from fedpet.modules.head import HeadTensor
from fedpet.modules.hiwi import HiwiBias, HiwiWeight
from fedpet.modules.lnfit import LNFit
from fedpet.modules.lora import LoRA, LoRAFactors
from fedpet.modules.masked import MaskedWeight, MaskedWeights

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
