"""Assign a tier to each client: drawn from its name, unless its node names another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fedpet.config import MaskConfig
from fedpet.pet.tiers import Tier, draw_tier
from fedpet.utils.seeds import client_id64


class TierAssignment:
    """Know the tier of each client.

    A tier that a node named is remembered for the rounds to come. A server that resumes a run has
    forgotten it: the node names it again, within the round, when it is sent another tier. That
    costs a message, and changes no result.

    Args:
        tiers: Of the plan, weakest first; mostly one.
        config: The plan's mask.
        names: All clients; in a deployment those known from the start, maybe none.
    """

    def __init__(
        self, tiers: Sequence[Tier], config: MaskConfig | None, names: Iterable[str]
    ) -> None:
        self.tiers = tuple(tiers)
        self._config = config
        self._index = {name: self._draw(name) for name in names}

    def index(self, name: str) -> int:
        """Return the index of a client's tier among `tiers`."""
        if name not in self._index:
            self._index[name] = self._draw(name)
        return self._index[name]

    def of(self, name: str) -> Tier:
        """Return a client's tier."""
        return self.tiers[self.index(name)]

    def move(self, name: str, density: float) -> bool:
        """Move a client to the tier that its node trains, which is another than it was asked for.

        Returns:
            Whether the density is that of another tier of the plan.
        """
        for index, tier in enumerate(self.tiers):
            if tier.density == density and index != self.index(name):
                self._index[name] = index
                return True
        return False

    def num_clients(self) -> list[int]:
        """Return the number of clients of each tier."""
        counts = [0] * len(self.tiers)
        for index in self._index.values():
            counts[index] += 1
        return counts

    def _draw(self, name: str) -> int:
        return draw_tier(self._config, client_id64(name))
