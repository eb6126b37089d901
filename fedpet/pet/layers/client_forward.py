"""Apply a module of the backbone to the rows of many clients, each with its own values.

In:  a module, what acts on it, and its trainables of B clients, stacked: (B, ...).
Out: a forward for inputs (B * rows, ...), client after client.

What is frozen is shared: one product serves all rows. A masked or wholly trained weight is made
for each client, (B, out, in), and multiplied as a batch; it lives for one product. The gradient at
a mask's positions is chosen from the dense one, which is as short-lived. Other changes are those of
the PET modules themselves, under `torch.vmap`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fedpet.pet.modules.base import GatedModule, PetModule, is_dense, is_transposed
from fedpet.pet.modules.lora import LowRankBranch
from fedpet.pet.modules.masked_weight import MaskedWeight

__all__ = ["ClientRows", "ClientSite", "NotStackableError"]

Forward = Callable[..., Any]


class NotStackableError(Exception):
    """A model that is not made of rows: its clients are trained one by one."""


@dataclass
class ClientRows:
    """The batch in work.

    Attributes:
        clients: How many there are.
        rows: Rows of each.
        stacked: The trainables of each PET module, (clients, ...); of each weight of the mask.
        written: Of each weight of the mask: the positions, and the numbers there.
    """

    clients: int = 0
    rows: int = 0
    stacked: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    written: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def of(self, part: PetModule | MaskedWeight) -> tuple[Tensor, ...]:
        """Return the trainables of a PET module, or of one weight of the mask."""
        return self.stacked[id(part)]

    def masked(self, part: MaskedWeight) -> tuple[Tensor, Tensor]:
        """Return the mask's positions in a weight, (k,), and the numbers there, (clients, k)."""
        return self.written[id(part)]

    def apart(self, x: Tensor) -> Tensor:
        """View (clients * rows, ...) as (clients, rows, ...).

        Raises:
            NotStackableError: The first dimension counts something else.
        """
        if x.shape[0] != self.clients * self.rows:
            raise NotStackableError(
                f"a module that is trained takes an input of shape {tuple(x.shape)}, and not a row "
                "a text"
            )
        return x.reshape(self.clients, self.rows, *x.shape[1:])

    def effect(self, module: GatedModule, x: Tensor | None) -> Tensor:
        """Compute each client's effect, of its rows of x: (clients, rows, ...); (clients, ...)."""

        def of_one(trainables: tuple[Tensor, ...], x: Tensor | None) -> Tensor:
            module.trainables = trainables
            return module.effect(x)

        before = module.trainables
        try:
            made: Tensor = torch.vmap(of_one, (0, None if x is None else 0))(self.of(module), x)
        finally:
            module.trainables = before
        return made


@dataclass
class ClientSite:
    """One module and what acts on it.

    Attributes:
        module: Of the backbone.
        plain: Its own forward.
        mask: Of its weight.
        leaves: By the name of a tensor: a change of it, counted from the pretrained tensor.
        effects: The others, in the order of the structure.
    """

    module: nn.Module
    plain: Forward
    mask: MaskedWeight | None = None
    leaves: dict[str, PetModule] = field(default_factory=dict)
    effects: list[GatedModule] = field(default_factory=list)

    def forward(self, batch: ClientRows) -> Forward:
        """Return the module's forward for the batches that `batch` describes."""
        return self._dense(batch) if is_dense(self.module) else self._other(batch)

    def _at(self, *places: str) -> list[GatedModule]:
        return [effect for effect in self.effects if effect.place in places]

    def _tensor(self, name: str, batch: ClientRows) -> Tensor | None:
        """Return the module's tensor of this name: shared, or (clients, ...) where it is trained.

        As in `Site`, a change of a tensor that the module has not stands for it.
        """
        tensor = self.module._parameters.get(name)
        found: Tensor | None = tensor
        leaf = self.leaves.get(name)
        if leaf is not None:
            assert leaf.pretrained is not None
            found = leaf.pretrained + batch.of(leaf)[0]
        for effect in self._at(name):
            change = batch.effect(effect, None)
            found = change if found is None else found + change
        return found

    def _dense(self, batch: ClientRows) -> Forward:
        shared = self.module._parameters["weight"]
        transposed, mask = is_transposed(self.module), self.mask
        parallel, sequential = self._at("parallel"), self._at("sequential")

        def forward(x: Tensor) -> Tensor:
            assert shared is not None
            rows = batch.apart(x)
            flat = rows.flatten(1, -2)  # (clients, tokens, in)
            bias = self._tensor("bias", batch)
            if mask is not None:
                weights = _MaskedWeights(shared, *batch.masked(mask), transposed)
                changes = batch.of(mask)[0]
                y = _MaskedByClient.apply(flat, bias, weights, changes)  # type: ignore[no-untyped-call]
            else:
                weight = self._tensor("weight", batch)
                assert weight is not None
                y = _product(flat, weight if transposed else weight.mT, bias)
            for effect in parallel:
                if isinstance(effect, LowRankBranch):
                    y = _add_low_rank(y, effect, batch.of(effect), flat)
                else:
                    y = y + batch.effect(effect, flat)
            for effect in sequential:
                y = y + batch.effect(effect, y)
            result: Tensor = y.reshape(*x.shape[:-1], y.shape[-1])
            return result

        return forward

    def _other(self, batch: ClientRows) -> Forward:
        own: dict[str, Any] = self.module._parameters
        names = ("weight", "bias", *(name for name in self.leaves if name not in own))
        changed = [n for n in names if n in self.leaves or self._at(n)]
        replaced = [name for name in changed if own.get(name) is not None]
        added = [name for name in changed if name not in replaced]
        sequential = self._at("sequential")

        def of_one(tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
            before = {name: own[name] for name in tensors}
            try:
                own.update(tensors)
                output: Tensor = self.plain(x)
                return output
            finally:
                own.update(before)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if replaced:
                if len(args) != 1 or kwargs:
                    raise NotStackableError("a norm that is trained takes more than one tensor")
                found = {name: self._tensor(name, batch) for name in replaced}
                tensors = {name: tensor for name, tensor in found.items() if tensor is not None}
                output = torch.vmap(of_one)(tensors, batch.apart(args[0])).flatten(0, 1)
            else:
                output = self.plain(*args, **kwargs)
            for name in added:
                vector = self._tensor(name, batch)
                assert vector is not None
                rows = batch.apart(output)
                output = (rows + _beside(vector, rows)).flatten(0, 1)
            for effect in sequential:
                hidden = output[0] if isinstance(output, tuple) else output
                changed = hidden + batch.effect(effect, batch.apart(hidden)).flatten(0, 1)
                output = (changed, *output[1:]) if isinstance(output, tuple) else changed
            return output

        return forward


def _beside(vector: Tensor, rows: Tensor) -> Tensor:
    """View (clients, d) so that it is added to (clients, rows, ..., d)."""
    return vector.view(len(vector), *[1] * (rows.dim() - 2), vector.shape[-1])


def _product(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply (clients, tokens, in) by (in, out) or (clients, in, out), and add the bias."""
    if matrix.dim() == 2 and (bias is None or bias.dim() == 1):
        return nn.functional.linear(x, matrix.mT, bias)
    if bias is not None and bias.dim() == 2:
        bias = bias[:, None]
    if matrix.dim() == 2 or bias is None:
        return x @ matrix if bias is None else x @ matrix + bias
    return torch.baddbmm(bias, x, matrix)


def _add_low_rank(
    y: Tensor, branch: LowRankBranch, trainables: tuple[Tensor, ...], x: Tensor
) -> Tensor:
    """Compute y + scale * (x A^T) B^T of each client: (clients, tokens, out)."""
    before = branch.trainables
    branch.trainables = trainables
    try:
        down, up = branch.factors()  # either may be shared
    finally:
        branch.trainables = before
    return torch.baddbmm(y, branch.scaled(x @ down.mT), up.mT)


@dataclass(frozen=True)
class _MaskedWeights:
    """A weight with the numbers of each client at the positions of its mask."""

    shared: Tensor
    places: Tensor  # int64, (k,), flat
    numbers: Tensor  # (clients, k): w0 + v
    transposed: bool  # shared is (in, out)

    def each(self) -> Tensor:
        """Make the matrix of each client: (clients, in, out)."""
        matrices = self.shared.detach().expand(len(self.numbers), *self.shared.shape).clone()
        matrices.flatten(1).index_copy_(1, self.places, self.numbers.to(matrices.dtype))
        return matrices if self.transposed else matrices.mT

    def gradient(self, x: Tensor, g: Tensor) -> Tensor:
        """Compute that of v, (clients, k), of an input and the gradient of the product with it."""
        whole = torch.bmm(x.mT, g) if self.transposed else torch.bmm(g.mT, x)
        return whole.flatten(1).index_select(1, self.places).to(self.numbers.dtype)


class _MaskedByClient(torch.autograd.Function):
    """x_b (W0 + scatter(v_b))^T + bias, for each client b."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, weights: _MaskedWeights, changes: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weights = weights
        return _product(x, weights.each(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        needs_x, needs_bias, *_ = ctx.needs_input_grad
        of_changes = ctx.weights.gradient(x, g)
        of_x = torch.bmm(g, ctx.weights.each().mT) if needs_x else None
        return of_x, g.sum(1) if needs_bias else None, None, of_changes
