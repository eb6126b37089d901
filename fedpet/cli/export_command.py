"""`fedpet export`: write what a run has trained for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedpet.cli.app import app
from fedpet.utils.paths import expand


@app.command(epilog="Example: fedpet export runs/film-reviews-1 --format peft --out my-adapter")
def export(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    out: Annotated[Path, typer.Option(help="The folder to make.")],
    format: Annotated[
        str,
        typer.Option(help="merged, a plain Hugging Face model; or peft, an adapter of peft."),
    ] = "merged",
    push_to_hub: Annotated[
        str, typer.Option(metavar="NAME", help="Upload it to this repository of the Hub too.")
    ] = "",
    public: Annotated[
        bool, typer.Option("--public", help="Let a repository that is made now be public.")
    ] = False,
) -> None:
    """Write what a run has trained for other tools: a plain model, or an adapter of peft."""
    from fedpet import export as exporting

    run, out = expand(run), expand(out)
    exporting.export_run(run, out, format)
    print(f"{'Adapter of peft' if format == 'peft' else 'Plain model'}: {out}")
    if push_to_hub:
        print(f"Uploaded: {exporting.push_to_hub(out, push_to_hub, private=not public)}")
