"""What a person sees of a run as it goes on: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time

from fedpet.protocol.ledger import SEARCH, Ledger, RoundRecord
from fedpet.run.live_line import LiveLine
from fedpet.utils.formatting import format_bytes, show_seconds


class Progress(LiveLine):
    """Rounds, the metric, bytes so far and the time left.

    In a terminal one line is redrawn; elsewhere a line is printed for each stage and each
    evaluated round.

    Args:
        num_rounds: How many there will be.
        metric: What the evaluation measures: "accuracy".
        search_rounds: Of a search before them, at most; 0 where there is none.
    """

    def __init__(self, num_rounds: int, metric: str, search_rounds: int = 0) -> None:
        super().__init__("rounds", num_rounds)
        self._num_rounds = num_rounds
        self._metric = metric
        self._search_rounds = search_rounds
        self._first: tuple[int, float] | None = None  # round seen here, and when it was over

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
        if self._first is not None:
            spent = (time.monotonic() - self._first[1]) / (record.round - self._first[0])
            left = spent * (self._num_rounds - record.round)
            parts.append(f"{show_seconds(left)} left")
        elif record.round > 0:
            self._first = record.round, time.monotonic()
        state = ", ".join(parts)
        self._show("training", record.round, self._num_rounds, state)
        if record.metric is not None:
            self._print(f"round {record.round}/{self._num_rounds}: {state}")

    def _search_round_done(self, record: RoundRecord, ledger: Ledger) -> None:
        """Show how much of the choice stayed as it was."""
        parts = []
        if record.overlap is not None:
            parts.append(f"{100 * record.overlap:.0f} % of the choice as before")
        state = ", ".join((*parts, *_sent_and_refused(record, ledger)))
        self._show("searching", record.round, self._search_rounds or None, state)
        of = f"/{self._search_rounds}" if self._search_rounds else ""
        self._print(f"search round {record.round}{of}: {state}")


def _sent_and_refused(record: RoundRecord, ledger: Ledger) -> list[str]:
    sent = ledger.total("uplink_bytes") + ledger.total("downlink_bytes")
    parts = [format_bytes(sent + ledger.total("plan_bytes"))]
    if record.refused:
        parts.append(f"{len(record.refused)} refused")
    return parts
