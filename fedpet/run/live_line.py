"""One line that follows what goes on: redrawn in a terminal, printed anew elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar


class LiveLine:
    """A stage, how far it has come, and its state in words.

    Args:
        unit: What is counted: "rounds".
        total: How many there will be; None where that is not known yet.
    """

    def __init__(self, unit: str, total: int | None = None) -> None:
        console = Console(stderr=True)
        self._live = console.is_terminal
        self._bar = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn(f"{{task.completed}}/{{task.total}} {unit}"),
            TextColumn("{task.fields[state]}", markup=False),
            console=console,
            disable=not self._live,
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=total, state="")

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

    def say(self, text: str) -> None:
        """Show the stage that begins; a sentence stays above the line."""
        if self._live and text.endswith("."):
            self._bar.console.print(text, markup=False, highlight=False)
        elif self._live:
            self._bar.update(self._task, description=text)
        else:
            self._print(text)

    def _show(self, stage: str, completed: int, total: int | None, state: str) -> None:
        """Redraw the line; a terminal alone has one."""
        if self._live:
            self._bar.update(
                self._task, description=stage, total=total, completed=completed, state=state
            )

    def _print(self, text: str) -> None:
        """Print a line where none is redrawn."""
        if not self._live:
            print(text, file=sys.stderr, flush=True)
