"""Call a user's code at the events of a run.

In:  callbacks: objects of a subclass of `Callback`, or the names of the shipped ones.
Out: one `Callbacks`, which passes each event on to all of them, in their order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpet.errors import ConfigError

if TYPE_CHECKING:
    from fedpet.config import Experiment
    from fedpet.protocol.ledger import Ledger, RoundRecord
    from fedpet.search import SearchProgress

__all__ = ["Callback", "Callbacks", "Evaluation", "RunStart"]


@dataclass(frozen=True, kw_only=True)
class RunStart:
    """A run whose first message is about to be sent.

    Attributes:
        experiment: All settings, `experiment.to_tables()` as nested dicts.
        folder: The run folder; callbacks may write into it.
        num_clients: Clients that take part; 0 in a deployment, whose nodes bring them.
        resumed: How often the run was resumed; 0 for a new one.
    """

    experiment: Experiment
    folder: Path
    num_clients: int
    resumed: int = 0


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The global model measured on the evaluation rows after a round.

    Attributes:
        round: 0 before the first.
        metrics: Values by name, the experiment's `data.metric` first.
        seconds: That it took.
    """

    round: int
    metrics: Mapping[str, float]
    seconds: float


class Callback:
    """Base class: override the events to act on. Each does nothing here.

    An event is called in the server's process, between rounds: what it takes, the run waits for.
    An exception ends the run, which can be resumed.

    Example:
        >>> class StopWatch(Callback):
        ...     def on_round_end(self, record, ledger):
        ...         print(record.round, record.loss, ledger.total_bytes)
    """

    def on_stage(self, text: str) -> None:
        """Take note of a stage that begins ("loading the backbone"), or of a sentence to read."""

    def on_rows(self, done: int, total: int) -> None:
        """Read how many rows of a split are tokenised; not called where the cache has them."""

    def on_run_start(self, run: RunStart) -> None:
        """Prepare for the rounds; called once data, backbone and run folder are there."""

    def on_evaluate(self, evaluation: Evaluation) -> None:
        """Read the metrics of an evaluation; called before the end of its round."""

    def on_round_end(self, record: RoundRecord, ledger: Ledger) -> None:
        """Read what a round cost and gave.

        Args:
            record: Loss, metric, bytes, seconds and refusals, as in a line of `rounds.jsonl`.
                Round 0 is the evaluation before the first. `record.kind` is "training", or
                "search" for rounds that search the structure.
            ledger: The records so far, and their sums.
        """

    def on_search_step(self, step: SearchProgress) -> None:
        """Read where a central search of the structure stands."""

    def on_run_end(self, result: Mapping[str, Any], folder: Path) -> None:
        """Read the result; a run that an exception ends has none, and this is not called.

        Args:
            result: What `result.json` holds.
            folder: The run folder, with the plain model in `model`.
        """


class Callbacks(Callback):
    """Pass each event on to several callbacks.

    Args:
        callbacks: Objects, or names of shipped ones ("tensorboard").

    Raises:
        ConfigError: An unknown name, or one whose package is not installed.
    """

    def __init__(self, callbacks: Iterable[Callback | str] = ()) -> None:
        self._callbacks: list[Callback] = []
        if isinstance(callbacks, str | Callback):
            callbacks = [callbacks]
        for callback in callbacks:
            if isinstance(callback, str):
                from fedpet.run.trackers import make_tracker

                callback = make_tracker(callback)
            elif not isinstance(callback, Callback):
                raise ConfigError(
                    f"callbacks must be objects of a subclass of fedpet.Callback, or names, got "
                    f"{callback!r}."
                )
            self._callbacks.append(callback)

    def on_stage(self, text: str) -> None:
        for callback in self._callbacks:
            callback.on_stage(text)

    def on_rows(self, done: int, total: int) -> None:
        for callback in self._callbacks:
            callback.on_rows(done, total)

    def on_run_start(self, run: RunStart) -> None:
        for callback in self._callbacks:
            callback.on_run_start(run)

    def on_evaluate(self, evaluation: Evaluation) -> None:
        for callback in self._callbacks:
            callback.on_evaluate(evaluation)

    def on_round_end(self, record: RoundRecord, ledger: Ledger) -> None:
        for callback in self._callbacks:
            callback.on_round_end(record, ledger)

    def on_search_step(self, step: SearchProgress) -> None:
        for callback in self._callbacks:
            callback.on_search_step(step)

    def on_run_end(self, result: Mapping[str, Any], folder: Path) -> None:
        for callback in self._callbacks:
            callback.on_run_end(result, folder)
