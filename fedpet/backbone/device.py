"""Place a model on a device: the processor, or a GPU of CUDA's.

In:  a name, from `run.device` or from a node's own configuration.
Out: the same, once torch is known to have it.

The device belongs to the process: it is not in the plan, and clients on either may work in
one round. Which GPU, where there are several, is what CUDA_VISIBLE_DEVICES says; a simulation's
workers share them. The mask, the codec and everything drawn from a seed are computed on the
processor wherever the model lies, so that all agree on them to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedpet.config import DEVICES
from fedpet.errors import ConfigError

__all__ = ["check_device", "device_of", "to_device"]


def check_device(name: str) -> str:
    """Return the device of this name, once torch is known to have it.

    Raises:
        ConfigError: There is none here.
    """
    if name not in DEVICES:
        raise ConfigError(f"a device is one of {', '.join(DEVICES)}, got {name!r}.")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "the device 'cuda' needs a GPU and a torch built for it, and torch "
            f"{torch.__version__} here sees none: install such a torch, or take 'cpu'."
        )
    return name


def to_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Put a batch's tensors on this device; those that lie there already are not copied."""
    return {name: tensor.to(device) for name, tensor in batch.items()}


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model, which its inputs must be on."""
    return next(model.parameters()).device
