"""Make a structure's file, a cell that others wait for: searched, by the clients too, or drawn."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.cell import RUN_AGAIN, Cell, Result
from benchmarks.stored_settings import with_new_fields
from fedpet.config import Experiment, SearchConfig
from fedpet.errors import ConfigError
from fedpet.pet.structure import Structure
from fedpet.utils.atomic_write import atomic_write

__all__ = ["StructureFile", "search_on_clients"]

# Of a search, filled in when it begins.
_SETTLED = ("budget", "learning_rate", "learning_rates", "mask_in_budget")


@dataclass(frozen=True)
class StructureFile(Cell):
    """Make the file of a structure as `fedpet search` does, by the clients where they search."""

    experiment: Experiment

    def settings(self) -> dict[str, Any]:
        """Return the settings of the search."""
        return {"search": self.experiment.to_tables()["search"]}

    def complete_settings(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        """Return them as they are."""
        return dict(stored)

    def read(self) -> Result | None:
        """Read the structure; None where it is not made.

        Raises:
            ConfigError: It was made with other settings.
        """
        from fedpet.search import reproducible_settings

        if not self.path.exists():
            return None
        structure = Structure.from_json(self.path.read_text(encoding="utf-8"))
        stored, config = structure.provenance, self.experiment.search
        settings = stored.get("settings")
        if settings is None:  # a random one, or a manual one, which has no seed
            found = (stored.get("seed", config.seed), stored.get("asked_budget"))
            same = found == (config.seed, config.budget)
        else:
            wanted = {**reproducible_settings(config), "asked_budget": config.budget}
            # A field that came later had its default.
            before = reproducible_settings(SearchConfig(federated=config.federated))
            before |= with_new_fields({"search": settings})["search"]
            before["asked_budget"] = stored.get("asked_budget")
            same = all(before.get(key) == wanted[key] for key in wanted if key not in _SETTLED)
        if not same:
            raise ConfigError(
                f"{str(self.path)!r} was made with other settings. "
                + RUN_AGAIN.format(str(self.path))
            )
        return {"structure": structure}

    def run(self) -> Result:
        """Search; an interrupted central search goes on where it stopped."""
        from fedpet.run.central_search import search_centrally
        from fedpet.run.progress import SearchBar

        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.experiment.search.federated:
            return {"structure": search_on_clients(self.experiment, self.path)}
        with SearchBar() as progress:
            return {"structure": search_centrally(self.experiment, self.path, progress)}

    def write(self, result: Result) -> None:
        """Do nothing: the search has written the file."""

    def score(self, result: Result) -> float | None:
        """Return the size in values."""
        return float(result["structure"].provenance["values"])

    def show(self, result: Result) -> str:
        """Describe its size."""
        return f"{self.score(result):,.0f} values"

    def fingerprint(self, result: Result) -> dict[str, Any]:
        """Return the whole file."""
        return {"structure": result["structure"].to_json()}


def search_on_clients(experiment: Experiment, out: Path) -> Structure:
    """Search on the clients as `fedpet search --federated` does, in this process and without Ray.

    Its rounds and bytes stand in the structure's provenance, and the processor time beside them.

    Args:
        experiment: As of a run; `search.federated` is set.
        out: The structure's file to make.
    """
    from fedpet.client.node_config import NodeConfig  # these bring torch
    from fedpet.protocol.flower_compat.flower_simulation import quiet_flower
    from fedpet.protocol.ledger import Ledger
    from fedpet.run.callbacks import Callback
    from fedpet.run.federated_search import make_client_pool, search_in_rounds
    from fedpet.run.local_grid import LocalGrid
    from fedpet.run.prepare import PreparedSearch, prepare
    from fedpet.run.run_folder import RunFolder

    started = time.process_time()
    with tempfile.TemporaryDirectory(prefix="fedpet-search-") as folder, quiet_flower():
        prepared = prepare(experiment, Callback())
        assert isinstance(prepared, PreparedSearch), "the clients search first"
        grid = LocalGrid.of(NodeConfig.from_experiment(experiment), 1)
        clients, run = make_client_pool(prepared), RunFolder(Path(folder))
        found = search_in_rounds(grid, prepared, clients, Ledger(), run, Callback())
    cost = {**found.provenance["search"], "processor_seconds": round(time.process_time() - started)}
    found = replace(found, provenance={**found.provenance, "search": cost})
    atomic_write(out, found.to_json().encode())
    return found
