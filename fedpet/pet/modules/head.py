"""Train the task's head in full.

In:  a parameter of the head at its start: the checkpoint's, or drawn anew.
Out: its change since that start, as values.
"""

from __future__ import annotations

from torch import Tensor, nn

from fedpet.pet.modules.base import PetModule

__all__ = ["HeadTensor"]


class HeadTensor(PetModule):
    """A dense change of one parameter of the head. Exact."""

    place = "tensor"
    as_leaf = True

    def __init__(self, name: str, parameter: Tensor) -> None:
        super().__init__("head", name)
        self._shape = tuple(parameter.shape)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return (self._shape,)

    @property
    def origin(self) -> Tensor | None:
        """Return the parameter's seeded start, which no checkpoint has."""
        return self.pretrained

    def count_from(self, origin: Tensor) -> None:
        assert self.pretrained is not None
        self.pretrained.copy_(origin)

    def merge(self, module: nn.Module) -> None:
        """Do nothing: the parameter has the change already."""
