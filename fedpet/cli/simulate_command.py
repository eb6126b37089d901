"""`fedpet simulate`: run a federation, or go on with one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import fedpet
from fedpet.cli.app import DEFAULT_EXPERIMENT, ExperimentName, Overrides, app, out_console
from fedpet.config.builtin import load_experiment
from fedpet.errors import InputError


@app.command(
    epilog="Example: fedpet simulate --set strategy.num-rounds=4 --set run.seed=1 --out runs/try"
)
def simulate(
    experiment: ExperimentName = DEFAULT_EXPERIMENT,
    overrides: Overrides = None,
    out: Annotated[str, typer.Option(help="The run folder to make.")] = "",
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN_DIR", help="Go on with a run that was cut short, from its last round."
        ),
    ] = None,
) -> None:
    """Run a federation on the Ray simulation engine, from backbone to plain model."""
    given = [name for name, value in (("--set", overrides), ("--out", out)) if value]
    if resume is not None and (given or experiment != DEFAULT_EXPERIMENT):
        raise InputError(
            f"--resume takes everything from its folder, and {given[0] if given else experiment!r} "
            "was given beside it: leave one out."
        )
    if resume is not None:
        run = fedpet.resume(resume)
    else:
        run = fedpet.simulate(load_experiment(experiment, overrides or []), out=out)

    from fedpet.report.run_table import run_table

    out_console.show(run_table(run.result))
    print(f"Run folder: {run.folder}   Plain model: {run.folder / 'model'}")
