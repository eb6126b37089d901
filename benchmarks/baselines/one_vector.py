"""Show a baseline to fedpet's protocol as a model with one vector of values.

In:  a `Baseline`, whose tensors a method trains.
Out: its changes since the start as one vector with a layout, as a `PetModel` has: so the same
     codecs, frames, strategies and books serve it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.baselines.methods import Baseline
from fedpet.pet.layout import Segment

__all__ = ["BaselineVector"]


class BaselineVector:
    """Read and write a baseline's tensors as the values that `PetModel` has.

    Laws: zeros are the start; `set_delta(get_delta())` moves nothing but by rounding.

    Args:
        baseline: Its tensors stand at their start.

    Attributes:
        model: Called with a batch.
        tensors: As they are sent.
        segments: A tensor each, in the order in which they are sent.
        tiers: The one layout.
        num_values: Length of the vector.
        inexact_kinds: Whose average is not the average of models: both factors of LoRA.
    """

    def __init__(self, baseline: Baseline) -> None:
        self.model: nn.Module = baseline.model
        self._groups = baseline.groups
        self.tensors = [p for group in baseline.groups.values() for p in group.values()]
        self._starts = [tensor.detach().clone() for tensor in self.tensors]
        segments: list[Segment] = []
        start = 0
        for kind, group in baseline.groups.items():
            for name, tensor in group.items():
                segments.append(Segment(kind, name, start, tensor.numel()))
                start += tensor.numel()
        self.segments = tuple(segments)
        self.tiers = (self.segments,)
        self.num_values = start
        factors = {part for s in segments for part in ("lora_A", "lora_B") if f".{part}." in s.name}
        self.inexact_kinds = ("lora",) if len(factors) == 2 else ()

    def set_tier(self, tier: int) -> None:
        """Do nothing: there is one tier."""

    @torch.no_grad()
    def get_delta(self) -> Tensor:
        """Return the changes since the start: float32, (num_values,), on the CPU."""
        changes = [
            (p - start).flatten() for p, start in zip(self.tensors, self._starts, strict=True)
        ]
        return torch.cat(changes).to("cpu", torch.float32)

    @torch.no_grad()
    def set_delta(self, delta: Tensor | np.ndarray, *, seed: int = 0) -> None:
        """Set the model to the start and these changes, (num_values,); nothing is drawn."""
        values = torch.as_tensor(delta)
        for segment, tensor, start in zip(self.segments, self.tensors, self._starts, strict=True):
            part = values[segment.start : segment.start + segment.size]
            tensor.copy_(start + part.view_as(start).to(start))

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return the tensors by kind."""
        return {kind: list(group.values()) for kind, group in self._groups.items()}

    def after_step(self) -> None:
        """Do nothing: the model computes with the tensors themselves."""

    def sent_values(self) -> tuple[list[nn.Parameter], list[Callable[[], Tensor]]]:
        """Return the tensors: they are sent as they are, but for a constant."""
        return list(self.tensors), []
