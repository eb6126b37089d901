"""Hold the trainables of many clients of one model at once, and call the model on all their rows.

In:  a model with its trainables, the point where all clients start, a seed for each.
Out: the trainables stacked, one parameter (clients, n) a kind of module; passes in which each
     client's rows meet its own; the point of each client.

The frozen weights are there once. Clients share no sum: what one does never reaches another, and
NaN stays where it is. A model whose trained modules do not see a row a text (DeBERTa's relative
positions) cannot be stacked; `check` compares passes and gradients with those of one client.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fedpet.pet.layers.client_forward import ClientRows, ClientSite, NotStackableError
from fedpet.pet.modules.base import PetModule
from fedpet.pet.modules.masked_weight import MaskedWeight, MaskedWeights

if TYPE_CHECKING:
    from fedpet.pet.trainable_model import TrainableModel

__all__ = ["ClientStack"]


class ClientStack:
    """Trainables of many clients.

    Law: a pass gives each client's rows what the model gives them at that client's point, up to
    the order in which sums are rounded.

    Attributes:
        groups: By kind of module: the trainables of the clients that are in work, (clients, n).
    """

    @torch.no_grad()
    def __init__(self, pet: TrainableModel, start: np.ndarray, seeds: Sequence[int]) -> None:
        """Put every client at one point.

        Args:
            pet: In the tier of all of them. It stands at the start afterwards.
            start: The values, (num_values,).
            seeds: Of each client's work, as for `set_delta`.
        """
        self._pet = pet
        storage = pet._storage
        values = torch.from_numpy(start)
        pet.set_delta(values, seed=seeds[0])
        flat = storage.flat.expand(len(seeds), -1).clone()  # (clients, n)
        drawn = [(m, place) for m, place in pet._indirect if not isinstance(m, MaskedWeights)]
        for own, seed in zip(flat, seeds, strict=True) if drawn else ():
            for module, place in drawn:
                module.write(values[place].to(storage.flat), seed)
            own.copy_(storage.flat)
        # Each kind's stretch of the flat storage; in a tier there are gaps between them.
        self._stretches = {
            kind: slice(group.storage_offset(), group.storage_offset() + group.numel())
            for kind, group in storage.groups.items()
        }
        self._whole = {k: flat[:, stretch].contiguous() for k, stretch in self._stretches.items()}
        self.groups = {kind: nn.Parameter(whole) for kind, whole in self._whole.items()}
        self._batch = ClientRows()
        self._sites = _sites_of(pet)

    @property
    def clients(self) -> int:
        """Count the clients in work."""
        return len(next(iter(self.groups.values())))

    def keep(self, clients: int) -> None:
        """Go on with the first clients alone; the others stay where they are."""
        for kind, group in self.groups.items():
            group.grad = None
            group.data = self._whole[kind][:clients]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Let the model compute for the clients within this context."""
        pet = self._pet
        changed_too = {own.module for own in self._sites}
        for site in pet._sites:
            if site.module in changed_too or not site.is_quantised:
                site.remove()
        before = {own.module: own.module.__dict__.get("forward") for own in self._sites}
        try:
            for changed in self._sites:
                changed.module.forward = changed.forward(self._batch)
            yield
        finally:
            for module, forward in before.items():
                del module.forward
                if forward is not None:
                    module.forward = forward
            for site in pet._sites:
                site.install(pet._gated)

    def __call__(self, inputs: Mapping[str, Tensor]) -> Any:
        """Call the model, within `installed`.

        Args:
            inputs: A batch, (clients * rows, ...), client after client.

        Raises:
            NotStackableError: The model is not made of rows.
        """
        batch = self._batch
        batch.clients = self.clients
        batch.rows = len(next(iter(inputs.values()))) // batch.clients
        self._take_apart()
        try:
            return self._pet.model(**inputs)
        finally:
            batch.stacked, batch.written = {}, {}

    def _take_apart(self) -> None:
        """View the groups as trainables: split once, so that their gradients are joined once."""
        pieces = self._batch.stacked
        for kind, group in self.groups.items():
            modules = [module for module in self._pet._pet_modules if module.kind == kind]
            shapes = [shape for module in modules for shape in module.shapes]
            split = iter(group.split([math.prod(shape) for shape in shapes], dim=1))
            for module in modules:
                own = tuple(next(split).view(len(group), *shape) for shape in module.shapes)
                pieces[id(module)] = own
                if isinstance(module, MaskedWeights):
                    numbers = module.numbers(group.detach())
                    for weight, part, written in zip(module.weights, own, numbers, strict=True):
                        pieces[id(weight)] = (part,)
                        self._batch.written[id(weight)] = written

    @torch.no_grad()
    def deltas(self) -> Tensor:
        """Return the values of all clients, those that left included: float32, (all, num_values).

        The model goes to the point of one of them.
        """
        pet = self._pet
        clients = len(next(iter(self._whole.values())))
        flat = pet._storage.flat.repeat(clients, 1)  # (all, n)
        for kind, stretch in self._stretches.items():
            flat[:, stretch] = self._whole[kind]
        values = flat.new_empty(len(flat), pet.num_values)
        for place, stretch in pet._direct:
            values[:, place] = flat[:, stretch]
        for module, place in pet._indirect:
            if isinstance(module, MaskedWeights):
                first = module.trainables[0].storage_offset()
                changes = flat[:, first : first + module.num_values]
                values[:, place] = module.by_rank(changes)
                continue
            for client in range(len(flat)):
                self._go_to(client)
                values[client, place] = module.read()
        return values.float()

    def _go_to(self, client: int) -> None:
        flat = self._pet._storage.flat
        for kind, stretch in self._stretches.items():
            flat[stretch] = self._whole[kind][client]

    def check(self, inputs: Mapping[str, Tensor]) -> None:
        """Compare passes of all clients with those of each, at random points.

        The points of the clients are other ones afterwards.

        Args:
            inputs: A batch, (clients * rows, ...).

        Raises:
            NotStackableError: They differ.
        """
        pet, storage = self._pet, self._pet._storage
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for whole in self._whole.values():
                whole.add_(0.1 * torch.randn(whole.shape, generator=generator).to(whole))
        with self.installed():
            logits = self(inputs).logits
            _weighted(logits, self.clients).backward()
        found = logits.detach().chunk(self.clients)
        for client in range(self.clients):
            with torch.no_grad():
                self._go_to(client)
                storage.write()
            storage.gradient.zero_()
            own = {name: tensor.chunk(self.clients)[client] for name, tensor in inputs.items()}
            alone = pet.model(**own).logits
            _weighted(alone, 1).backward()
            pairs = [(found[client], alone.detach())]
            for kind, group in storage.groups.items():
                gradient = self.groups[kind].grad
                assert gradient is not None
                assert group.grad is not None
                pairs.append((gradient[client], group.grad))
            for one, other in pairs:
                if not _are_close(one, other, next(pet.model.parameters()).dtype):
                    raise NotStackableError("a pass of many clients gives other numbers")


def _weighted(logits: Tensor, clients: int) -> Tensor:
    """Sum the outputs so that each counts, alike in each client."""
    weights = torch.linspace(-1, 1, logits.numel() // clients, dtype=logits.dtype) + 1.5
    return (logits.reshape(clients, -1) * weights.to(logits.device)).sum()


def _are_close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Compare by norm; a wrong pass differs by about 1."""
    tolerance = 3 * math.sqrt(torch.finfo(dtype).eps)
    return bool((found - expected).norm() <= tolerance * expected.norm() + 1e-6)


def _sites_of(pet: TrainableModel) -> list[ClientSite]:
    """Gather what acts on each module: masks, modules of the structure, tensors of the head."""
    sites: dict[str, ClientSite] = {}

    def site_at(name: str) -> ClientSite:
        if name not in sites:
            module = pet.model.get_submodule(name)
            plain = type(module).forward.__get__(module)
            sites[name] = ClientSite(module, plain)
        return sites[name]

    for own in pet._sites:
        mask: MaskedWeight | None = own.mask if own.mask and own.mask.num_values else None
        if mask is None and not own.effects:
            continue
        site = site_at(own.name)
        site.plain, site.mask = own._before or site.plain, mask
        for effect in own.effects:
            if effect.as_leaf and effect.pretrained is not None:
                site.leaves[effect.place] = effect
            else:
                site.effects.append(effect)
    heads: list[PetModule] = [module for module in pet._pet_modules if module.place == "tensor"]
    for head in heads:
        name, _, tensor = head.target.rpartition(".")
        site_at(name).leaves[tensor] = head
    return list(sites.values())
