"""Show how far a run or a search has come: a bar in a terminal or a notebook, else plain lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from importlib.util import find_spec
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import BarColumn, Task, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Column
from rich.text import Text

from fedpet.config import Experiment
from fedpet.protocol.ledger import EVALUATION, SEARCH, Ledger, RoundRecord
from fedpet.run.callbacks import Callback
from fedpet.run.interrupts import stoppable
from fedpet.utils.formatting import format_bytes, show_seconds, show_spread

if TYPE_CHECKING:
    from fedpet.search import SearchProgress as SearchStep

__all__ = ["LiveLine", "Progress", "SearchBar"]

QUIET_SECONDS = 60.0  # after which a long round says in a line of its own how far it is


class _State(TextColumn):
    """Text that gives way where a terminal is narrow, and stays on the line."""

    def __init__(self) -> None:
        super().__init__("{task.fields[state]}", markup=False, table_column=Column())

    def render(self, task: Task) -> Text:
        text = super().render(task)
        text.no_wrap, text.overflow = True, "ellipsis"
        return text


class LiveLine(Callback):
    """A stage, how far it has come, and its state in words.

    One line is redrawn in a terminal, and in a notebook that has ipywidgets; elsewhere a line is
    printed for each stage.

    Args:
        total: How many rounds or steps there will be; None where that is not known yet.
    """

    def __init__(self, total: int | None = None) -> None:
        console = Console(stderr=True)
        widgets = console.is_jupyter and find_spec("ipywidgets") is not None
        self._live = console.is_terminal or widgets
        self._bar = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=10),
            TimeElapsedColumn(),
            _State(),
            console=console,
            disable=not self._live,
            transient=True,
        )
        self._total, self._counts_rows = total, False
        self._task = self._bar.add_task("starting", total=total, state="")
        self._first: tuple[int, float] | None = None  # counted then, and the clock
        self._started = self._printed_at = time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def on_stage(self, text: str) -> None:
        """Show the stage that begins; a sentence stays above the line."""
        if self._live and text.endswith("."):
            self._bar.console.print(text, markup=False, highlight=False)
        elif self._live:
            if self._counts_rows:  # all of them: what is counted from here on has a bar of its own
                self._show(text, 0, self._total)
            self._counts_rows = False
            self._bar.update(self._task, description=text)
        else:
            self._print(text)

    def on_rows(self, done: int, total: int) -> None:
        """Show how many rows are tokenised."""
        self._counts_rows = True
        self._show(f"tokenising the rows · {done:,} of {total:,}", done, total)

    def _show(self, stage: str, completed: float, total: int | None, state: str = "") -> None:
        """Redraw the line; a state stays until there is another."""
        if self._live:
            fields: dict[str, Any] = {"state": state} if state else {}
            self._bar.update(
                self._task, description=stage, total=total, completed=completed, **fields
            )

    def _print(self, text: str) -> None:
        """Print a line where none is redrawn."""
        if not self._live:
            print(text, file=sys.stderr, flush=True)
            self._printed_at = time.monotonic()

    def _time_left(self, completed: int, total: int) -> list[str]:
        """Reckon the rest from what was counted here."""
        now = time.monotonic()
        if self._first is None:
            if completed > 0:
                self._first = completed, now
            return []
        spent = (now - self._first[1]) / max(completed - self._first[0], 1)
        return [f"{show_seconds(spent * (total - completed))} left"]


class Progress(LiveLine):
    """Rounds, clients that have answered, the metric, the loss, bytes so far and the time left.

    Args:
        num_rounds: Of training.
        metric: By which the evaluation measures: "accuracy".
        search_rounds: Of a search before them, at most; 0 where there is none.
    """

    def __init__(self, num_rounds: int, metric: str, search_rounds: int = 0) -> None:
        super().__init__(num_rounds)
        self._num_rounds = num_rounds
        self._metric = metric
        self._search_rounds = search_rounds

    @classmethod
    def of(cls, experiment: Experiment) -> Progress:
        """Make the progress of a run of this experiment."""
        searches = experiment.search.rounds if experiment.search.federated else 0
        return cls(experiment.strategy.num_rounds, experiment.data.metric, searches)

    def on_reply(self, record: RoundRecord, answered: int) -> None:
        """Show how many of the round's clients have answered."""
        stage, total = self._round(record)
        text = f"{stage} · {answered} of {record.clients} clients"
        self._show(text, record.round - 1 + answered / record.clients, total)
        now = time.monotonic()
        if now - self._printed_at >= QUIET_SECONDS:
            self._print(f"{text} · {show_seconds(now - self._started)}")

    def _round(self, record: RoundRecord) -> tuple[str, int | None]:
        """Name a round; return of how many it is, where that is known."""
        searches = record.kind == SEARCH
        total = (self._search_rounds or None) if searches else self._num_rounds
        of = "" if total is None else f" of {total}"
        return f"{'search round' if searches else 'round'} {record.round}{of}", total

    def on_round_end(self, record: RoundRecord, ledger: Ledger) -> None:
        """Show where the run stands."""
        if record.kind == SEARCH:
            self._on_search_round_end(record, ledger)
            return
        if record.kind == EVALUATION:
            for name, spread in record.on_clients.items():
                self._say(f"round {record.round}: {self._metric} on clients, {name}", spread)
            return
        parts = []
        evaluated = [r for r in ledger.rounds if r.metric is not None]
        if evaluated:
            last = evaluated[-1]
            when = "" if last is record else f" at round {last.round}"
            parts.append(f"{self._metric} {last.metric:.4f}{when}")
        if record.loss is not None:
            parts.append(f"loss {record.loss:.3f}")
        if own := record.on_clients.get("before"):
            parts.append(f"on clients, before it {show_spread(own)}")
        parts += _sent_and_refused(record, ledger)
        parts += self._time_left(record.round, self._num_rounds)
        state = ", ".join(parts)
        stage, total = self._round(record)
        self._show(stage, record.round, total, state)
        if record.metric is not None or record.on_clients:
            self._print(f"{stage}: {state}")

    def _say(self, what: str, spread: Mapping[str, Any]) -> None:
        """Leave a sentence above the line, or print it."""
        self.on_stage(f"{what}: {show_spread(spread)}.")

    def _on_search_round_end(self, record: RoundRecord, ledger: Ledger) -> None:
        """Show how much of the choice stayed as it was."""
        parts = []
        if record.overlap is not None:
            parts.append(f"{100 * record.overlap:.0f} % of the choice as before")
        state = ", ".join((*parts, *_sent_and_refused(record, ledger)))
        stage, total = self._round(record)
        self._show(stage, record.round, total, state)
        self._print(f"{stage}: {state}")


def _sent_and_refused(record: RoundRecord, ledger: Ledger) -> list[str]:
    parts = [format_bytes(ledger.total_bytes)]
    if record.refused:
        parts.append(f"{len(record.refused)} refused")
    return parts


class SearchBar(LiveLine):
    """Steps, losses, the validation score and the time left of a central search.

    Ctrl-C and SIGTERM end what is inside with `RunInterrupted`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._last = 0
        self._stop = stoppable(self._how_to_go_on)

    def _how_to_go_on(self) -> str:
        if not self._last:
            return "No step was taken: start it again."
        return "The same command goes on from the last saved step."

    def __enter__(self) -> Self:
        self._stop.__enter__()
        return super().__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        self._stop.__exit__(kind, error, trace)

    def on_search_step(self, step: SearchStep) -> None:
        """Show where the search stands."""
        parts = [f"loss {step.alpha_loss:.3f}"]
        if step.best_score is not None:
            parts.append(f"best score {step.best_score:.4f}")
        if self._first is None and step.step > 1:
            self._print(f"going on from step {step.step - 1}")
        parts += self._time_left(step.step, step.total_steps)
        self._last = step.step
        state = ", ".join(parts)
        stage = f"step {step.step} of {step.total_steps}"
        self._show(stage, step.step, step.total_steps, state)
        if step.score is not None:
            self._print(f"{stage}: {state}")
