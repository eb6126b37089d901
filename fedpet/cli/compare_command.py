"""`fedpet compare`: put runs side by side in a table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedpet.cli.app import app, out_console


@app.command(epilog="Example: fedpet compare runs/a runs/b benchmarks/results/default")
def compare(
    runs: Annotated[
        list[Path], typer.Argument(help="Run folders, result.json files, or folders of those.")
    ],
) -> None:
    """Put runs side by side, runs of one method and experiment averaged over their seeds."""
    from fedpet.report.compare import compare_table
    from fedpet.report.results import read_results

    out_console.show(compare_table(read_results(runs)))
