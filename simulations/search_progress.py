"""What a person sees of a search as it goes on: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from fedpet.search import SearchProgress as Step
from fedpet.units import show_seconds


class SearchProgress:
    """Steps, losses, the validation score and the time left.

    In a terminal one line is redrawn; elsewhere a line is printed for each stage and each
    evaluated step.
    """

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._live = self._console.is_terminal
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} steps"),
            TextColumn("{task.fields[state]}"),
            console=self._console,
            disable=not self._live,
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=None, state="")
        self._first: tuple[int, float] | None = None
        self._last = 0

    def __enter__(self) -> SearchProgress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()
        if kind is KeyboardInterrupt and self._last:
            print("The same command goes on from the last saved step.", file=sys.stderr)

    def say(self, text: str) -> None:
        """Show the stage that begins."""
        if self._live:
            self._bar.update(self._task, description=text)
        else:
            print(text, file=sys.stderr, flush=True)

    def step(self, progress: Step) -> None:
        """Show where the search stands."""
        parts = [f"loss {progress.alpha_loss:.3f}"]
        if progress.best_score is not None:
            parts.append(f"best score {progress.best_score:.4f}")
        if self._first is None:
            self._first = progress.step, time.monotonic()
            if progress.step > 1 and not self._live:
                print(f"going on from step {progress.step - 1}", file=sys.stderr, flush=True)
        elif progress.step > self._first[0]:
            spent = (time.monotonic() - self._first[1]) / (progress.step - self._first[0])
            left = spent * (progress.total_steps - progress.step)
            parts.append(f"{show_seconds(left)} left")
        self._last = progress.step
        state = ", ".join(parts)
        if self._live:
            self._bar.update(
                self._task,
                description="searching",
                total=progress.total_steps,
                completed=progress.step,
                state=state,
            )
        elif progress.score is not None:
            print(
                f"step {progress.step}/{progress.total_steps}: {state}",
                file=sys.stderr,
                flush=True,
            )
