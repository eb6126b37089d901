"""What a person sees of a run as it goes on: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from fedpet.ledger import SEARCH, Ledger, RoundRecord
from fedpet.units import show_bytes, show_seconds


class Progress:
    """Rounds, the metric, bytes so far and the time left.

    In a terminal one line is redrawn; elsewhere a line is printed for each stage and each
    evaluated round.

    Args:
        num_rounds: How many there will be.
        metric: What the evaluation measures: "accuracy".
        search_rounds: Of a search before them, at most; 0 where there is none.
    """

    def __init__(self, num_rounds: int, metric: str, search_rounds: int = 0) -> None:
        self._num_rounds = num_rounds
        self._metric = metric
        self._search_rounds = search_rounds
        self._console = Console(stderr=True)
        self._live = self._console.is_terminal
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} rounds"),
            TextColumn("{task.fields[state]}"),
            console=self._console,
            disable=not self._live,
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=num_rounds, state="")
        self._first_round_ended = 0.0

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Show the stage that begins."""
        if self._live:
            self._bar.update(self._task, description=text)
        else:
            print(text, file=sys.stderr, flush=True)

    def round_done(self, record: RoundRecord, ledger: Ledger) -> None:
        """Show where the run stands after a round."""
        if record.kind == SEARCH:
            self._search_round_done(record, ledger)
            return
        parts = []
        evaluated = [r for r in ledger.rounds if r.metric is not None]
        if evaluated:
            last = evaluated[-1]
            when = "" if last is record else f" at round {last.round}"
            parts.append(f"{self._metric} {last.metric:.4f}{when}")
        parts += _sent_and_refused(record, ledger)
        if record.round == 1:
            self._first_round_ended = time.monotonic()
        elif record.round > 1:
            spent = time.monotonic() - self._first_round_ended
            left = spent / (record.round - 1) * (self._num_rounds - record.round)
            parts.append(f"{show_seconds(left)} left")
        state = ", ".join(parts)
        if self._live:
            self._bar.update(
                self._task,
                description="training",
                total=self._num_rounds,
                completed=record.round,
                state=state,
            )
        elif record.metric is not None:
            print(f"round {record.round}/{self._num_rounds}: {state}", file=sys.stderr, flush=True)

    def _search_round_done(self, record: RoundRecord, ledger: Ledger) -> None:
        """Show how much of the choice stayed as it was."""
        parts = []
        if record.overlap is not None:
            parts.append(f"{100 * record.overlap:.0f} % of the choice as before")
        state = ", ".join((*parts, *_sent_and_refused(record, ledger)))
        if self._live:
            self._bar.update(
                self._task,
                description="searching",
                total=self._search_rounds or None,
                completed=record.round,
                state=state,
            )
        else:
            of = f"/{self._search_rounds}" if self._search_rounds else ""
            print(f"search round {record.round}{of}: {state}", file=sys.stderr, flush=True)


def _sent_and_refused(record: RoundRecord, ledger: Ledger) -> list[str]:
    sent = ledger.total("uplink_bytes") + ledger.total("downlink_bytes")
    parts = [show_bytes(sent + ledger.total("plan_bytes"))]
    if record.refused:
        parts.append(f"{len(record.refused)} refused")
    return parts
