"""Where a model computes: on the processor, or on a GPU of CUDA's.

    [backbone] -> mask -> structure -> search -> model -> ...

In:  a name, from `run.device` or from a node's own configuration.
Out: the same, once torch is known to have it.

The device is nobody's but the process's: it is not in the plan, and clients on either may work in
one round. Which GPU, where there are several, is what CUDA_VISIBLE_DEVICES says; a simulation's
workers share them. The mask, the codec and everything drawn from a seed are computed on the
processor wherever the model lies, so that all agree on them to the bit.
"""

from __future__ import annotations

import torch
from torch import nn

from fedpet.errors import ConfigError

__all__ = ["DEVICES", "check_device", "device_of"]

DEVICES = ("cpu", "cuda")


def check_device(name: str) -> str:
    """The device of this name.

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


def device_of(model: nn.Module) -> torch.device:
    """Where the model lies, and its inputs must."""
    return next(model.parameters()).device
