"""What a person sees of a search as it goes on: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from fedpet.run.interrupts import stoppable
from fedpet.run.live_line import LiveLine
from fedpet.search import SearchProgress as Step
from fedpet.utils.formatting import show_seconds


class SearchProgress(LiveLine):
    """Steps, losses, the validation score and the time left.

    In a terminal one line is redrawn; elsewhere a line is printed for each stage and each
    evaluated step. Ctrl-C and SIGTERM end what is inside with `RunInterrupted`.
    """

    def __init__(self) -> None:
        super().__init__("steps")
        self._first: tuple[int, float] | None = None
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

    def step(self, progress: Step) -> None:
        """Show where the search stands."""
        parts = [f"loss {progress.alpha_loss:.3f}"]
        if progress.best_score is not None:
            parts.append(f"best score {progress.best_score:.4f}")
        if self._first is None:
            self._first = progress.step, time.monotonic()
            if progress.step > 1:
                self._print(f"going on from step {progress.step - 1}")
        elif progress.step > self._first[0]:
            spent = (time.monotonic() - self._first[1]) / (progress.step - self._first[0])
            left = spent * (progress.total_steps - progress.step)
            parts.append(f"{show_seconds(left)} left")
        self._last = progress.step
        state = ", ".join(parts)
        self._show("searching", progress.step, progress.total_steps, state)
        if progress.score is not None:
            self._print(f"step {progress.step}/{progress.total_steps}: {state}")
