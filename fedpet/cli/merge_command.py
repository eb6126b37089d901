"""`fedpet merge`: fold a run's values into a plain model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedpet.cli.app import app
from fedpet.cli.export_command import export


@app.command(epilog="Example: fedpet merge runs/film-reviews-1 --out my-model")
def merge(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    out: Annotated[Path, typer.Option(help="The Hugging Face folder to make.")],
) -> None:
    """Fold a run's values into a plain Hugging Face model."""
    export(run, out)
