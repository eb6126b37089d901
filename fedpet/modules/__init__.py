"""The PET modules, one a file, behind the interface of `base`."""

from fedpet.modules.adapter import LowRankAdapter
from fedpet.modules.base import PetModule
from fedpet.modules.bitfit import BitFit, NormBias
from fedpet.modules.head import HeadTensor
from fedpet.modules.hiwi import HiwiBias, HiwiWeight
from fedpet.modules.lnfit import LNFit
from fedpet.modules.lora import LoRA, LoRAFactors
from fedpet.modules.masked import MaskedWeight

__all__ = [
    "BitFit",
    "HeadTensor",
    "HiwiBias",
    "HiwiWeight",
    "LNFit",
    "LoRA",
    "LoRAFactors",
    "LowRankAdapter",
    "MaskedWeight",
    "NormBias",
    "PetModule",
]
