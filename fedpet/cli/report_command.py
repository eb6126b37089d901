"""`fedpet report`: write the HTML page of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedpet.cli.app import app
from fedpet.utils.paths import check_output, expand


@app.command(
    epilog="Example: fedpet report runs/film-reviews-1 --compare runs/full-1 --png plot.png"
)
def report(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    compare: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="RUN",
            help="Runs to show beside it, as `fedpet compare` takes them. Repeatable.",
        ),
    ] = None,
    out: Annotated[str, typer.Option(help="The page; RUN/report.html where left out.")] = "",
    png: Annotated[str, typer.Option(help="Write the main plot to this file too.")] = "",
) -> None:
    """Write one HTML page about a run: quality against bytes, bytes by round, where it trained."""
    from fedpet.utils.extras import check_extra

    check_extra("matplotlib", "report", "the page of a run")
    from fedpet.report.loading import read_report
    from fedpet.report.page import write_page, write_png

    path = expand(out) if out else run / "report.html"
    if out or run.is_dir():
        check_output(path)
    if png:
        check_output(expand(png))
    read = read_report(run, compare or [])
    write_page(read, path)
    print(f"Page: {path}")
    if png:
        write_png(read, expand(png))
        print(f"Plot: {png}")
