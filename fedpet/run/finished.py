"""Read a finished run: metrics, history, books, model.

In:  a run folder.
Out: a `Run`, whose parts are read when they are asked for.
"""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from fedpet.errors import ConfigError
from fedpet.protocol.ledger import TRAINING, Ledger

if TYPE_CHECKING:
    from fedpet.pet.model import PetModel

__all__ = ["History", "Run"]


class History(list[dict[str, Any]]):
    """A row a round, as dicts of the same keys.

    Keys: round, the metrics by name (None where a round was not evaluated), loss (the clients'
    mean), clients, replies, refused, uplink_bytes, downlink_bytes, plan_bytes, total_bytes (so
    far), train_seconds, round_seconds, evaluation_seconds. Round 0 is the evaluation before the
    first. Where clients measure on their own rows, also clients_before and clients_after: the mean
    by rows before and after their training in the round.
    """

    def to_pandas(self) -> Any:
        """Return a DataFrame with the round as its index.

        Raises:
            ConfigError: pandas is not installed.
        """
        try:
            pandas: Any = importlib.import_module("pandas")
        except ModuleNotFoundError:
            raise ConfigError(
                "to_pandas needs pandas: `pip install pandas`, or take the rows as dicts."
            ) from None
        return pandas.DataFrame(list(self)).set_index("round")


class Run:
    """A finished run.

    Args:
        folder: Its run folder.

    Attributes:
        folder: The run folder; `folder / "model"` is the plain model.
        result: What `result.json` holds.

    Raises:
        ConfigError: The folder holds no finished run.

    Example:
        run = fedpet.Run("runs/film-reviews-1")
        run.metrics["accuracy"], run.ledger.total_bytes, run.history[-1]["loss"]
        run.model.merge_and_unload().save_pretrained("my-model")
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            text = (self.folder / "result.json").read_text(encoding="utf-8")
            self.result: dict[str, Any] = json.loads(text)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{str(self.folder)!r} is no folder of a finished run: result.json does not read "
                f"({error}). A run that was cut short goes on by fedpet.resume."
            ) from None

    def __repr__(self) -> str:
        values = ", ".join(f"{name} {value}" for name, value in self.metrics.items())
        return f"Run({str(self.folder)!r}: {values}, {self.ledger.total_bytes:,} bytes)"

    @property
    def metrics(self) -> dict[str, float]:
        """Return the final model's metrics on the evaluation rows, by name."""
        quality = self.result["quality"]
        return {quality["metric"]: quality["final"], **quality.get("metrics", {})}

    @functools.cached_property
    def history(self) -> History:
        """Return the rounds of training, a row each."""
        path = self.folder / "rounds.jsonl"
        length = path.stat().st_size
        quality, total, rows = self.result["quality"], 0, History()
        metric = quality["metric"]
        others = [name for name in quality.get("metrics", {}) if name != metric]
        rounds = Ledger.reopen(path, length).rounds
        own = [name for name in ("before", "after") if any(name in r.on_clients for r in rounds)]
        for record in rounds:
            total += record.uplink_bytes + record.downlink_bytes + record.plan_bytes
            if record.kind == TRAINING:
                rows.append(
                    {
                        "round": record.round,
                        metric: record.metric,
                        **{name: record.metrics.get(name) for name in others},
                        **{
                            f"clients_{name}": record.on_clients.get(name, {}).get("row_mean")
                            for name in own
                        },
                        "loss": record.loss,
                        "clients": record.clients,
                        "replies": record.replies,
                        "refused": len(record.refused),
                        "uplink_bytes": record.uplink_bytes,
                        "downlink_bytes": record.downlink_bytes,
                        "plan_bytes": record.plan_bytes,
                        "total_bytes": total,
                        "train_seconds": record.train_seconds,
                        "round_seconds": record.round_seconds,
                        "evaluation_seconds": record.evaluation_seconds,
                    }
                )
        return rows

    @property
    def ledger(self) -> SimpleNamespace:
        """Return the table "communication" of `result.json`, its keys as attributes.

        `total_bytes`, `uplink_bytes`, `downlink_bytes`, `plan_bytes`: what the devices sent and
        received, each client alone. `ratio_to_dense`: the total against FedAvg of all parameters
        (`dense_fedavg_total_bytes`). `wire_bytes`: this run's own messages.
        """
        return SimpleNamespace(**self.result["communication"])

    @functools.cached_property
    def model(self) -> PetModel:
        """Load the backbone with the final values; `merge_and_unload()` gives the plain model.

        Raises:
            BackboneError: The checkpoint is not to be had here.
            PlanError: The checkpoint here is another than the run's.
        """
        from fedpet.export.saved_run import SavedRun

        return SavedRun(self.folder).load()
