"""Call a user's code at the events of a run.

In:  objects of a subclass of `Callback`; fedpet/run/trackers.py makes the shipped ones by name.
Out: one `Callbacks`, which passes each event on to all of them, in their order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

    An event is called in the server's process, `on_reply` within rounds and the others between
    them: what it takes, the run waits for.
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

    def on_reply(self, record: RoundRecord, answered: int) -> None:
        """Read how far a round is; called as replies come, of one client or of many.

        Args:
            record: Of the open round; `record.clients` were asked.
            answered: Of them, those that have been answered for by now.
        """

    def on_round_end(self, record: RoundRecord, ledger: Ledger) -> None:
        """Read what a round cost and gave.

        Args:
            record: Loss, metric, bytes, seconds and refusals, as in a line of `rounds.jsonl`.
                Round 0 is the evaluation before the first. `record.kind` is "training",
                "search" for rounds that search the structure, or "evaluation" where clients
                measured the values after a round; `record.on_clients` has what they measured.
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
    """Pass each event on to several callbacks, in their order."""

    def __init__(self, callbacks: Iterable[Callback]) -> None:
        self._callbacks = list(callbacks)

    def on_stage(self, text: str) -> None:
        self._call("on_stage", text)

    def on_rows(self, done: int, total: int) -> None:
        for callback in self._callbacks:
            callback.on_rows(done, total)

    def on_run_start(self, run: RunStart) -> None:
        self._call("on_run_start", run)

    def on_evaluate(self, evaluation: Evaluation) -> None:
        self._call("on_evaluate", evaluation)

    def on_reply(self, record: RoundRecord, answered: int) -> None:
        self._call("on_reply", record, answered)

    def on_round_end(self, record: RoundRecord, ledger: Ledger) -> None:
        self._call("on_round_end", record, ledger)

    def on_search_step(self, step: SearchProgress) -> None:
        self._call("on_search_step", step)

    def on_run_end(self, result: Mapping[str, Any], folder: Path) -> None:
        self._call("on_run_end", result, folder)

    def _call(self, event: str, *arguments: Any) -> None:
        for callback in self._callbacks:
            getattr(callback, event)(*arguments)
