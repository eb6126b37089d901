"""Run one baseline, or a whole table: `python -m benchmarks`, from a checkout.

Exit codes are those of `fedpet`: 0 done; 1 a run failed, learned nothing, or a check differs;
2 bad input, one clear sentence; 130 interrupted, and resumed by the same command.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import click
import typer
from rich.console import Console

from benchmarks.baselines import METHODS, run_baseline
from benchmarks.experiment_grid import FEDPET
from benchmarks.grid import PHASES
from benchmarks.suite_file import read_suite
from benchmarks.suite_tables import costs_table, suite_table
from benchmarks.tables import final_table, overlaps, read_grid, tuning_table
from fedpet.config import Experiment
from fedpet.config.builtin import experiment_file
from fedpet.errors import ConfigError, FedpetError, InputError

SUITE = Path(__file__).with_name("suite.toml")
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Compare fedpet with others on the same clients, seeds, rounds and evaluation.",
)
console = Console()


@app.command(epilog="Example: python -m benchmarks run full --set run.seed=1")
def run(
    method: Annotated[
        str, typer.Argument(help=f"{', '.join(METHODS)}, or {FEDPET}.", metavar="METHOD")
    ],
    experiment: Annotated[
        str,
        typer.Argument(metavar="[EXPERIMENT]", help="A TOML file, or the name of a built-in one."),
    ] = "film-reviews",
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Overrides one key of the experiment."),
    ] = None,
    out: Annotated[str, typer.Option(help="The run folder to make.")] = "",
) -> None:
    """Run one method and leave result.json, rounds.jsonl and config.toml."""
    from fedpet.run.progress import Progress
    from fedpet.run.ray_engine import simulate

    if method not in (*METHODS, FEDPET):
        raise ConfigError(f"unknown method {method!r}. Known are: {', '.join((*METHODS, FEDPET))}.")
    settings = Experiment.from_file(experiment_file(experiment), overrides or [])
    if out:
        settings = replace(settings, run=replace(settings.run, out=out))
    with Progress(settings.strategy.num_rounds, settings.data.metric) as progress:
        if method == FEDPET:
            result, folder = simulate(settings, progress)
        else:
            result, folder = run_baseline(method, settings, progress)
    quality = result["quality"]
    console.print(f"{method}: {quality['metric']} {quality['final']:.4f}   Run: {folder.path}")


@app.command(epilog="Example: python -m benchmarks table benchmarks/default.toml")
def table(
    file: Annotated[Path, typer.Argument(help="The table: methods, grids, splits, seeds.")],
    phase: Annotated[str, typer.Option(help=f"{', '.join(PHASES)}; all by default.")] = "",
    only: Annotated[
        list[str] | None, typer.Option(metavar="METHOD", help="Leave the other methods out.")
    ] = None,
    check: Annotated[
        int, typer.Option(metavar="N", help="Run N finished cells again, and compare.")
    ] = 0,
    data: Annotated[
        Path | None, typer.Option(help="The folder of the data sets that the table names.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Cells at once, one thread each.", min=1)] = 1,
) -> None:
    """Run the missing cells of a table, and show it. Interrupt and resume at will."""
    if phase not in ("", *PHASES):
        raise ConfigError(f"--phase must be one of {', '.join(PHASES)}, got {phase!r}.")
    phases = (phase,) if phase else PHASES
    progress = Console(stderr=True, highlight=False)
    grid = read_grid(
        file,
        data=data,
        say=lambda line: progress.print(line, markup=False, soft_wrap=True),
        only=tuple(only or ()),
        jobs=jobs,
    )
    if check:
        if not grid.check(check, phases):
            raise typer.Exit(1)
        return
    grid.complete(phases)
    if "tune" in phases and any(len(method.rates) > 1 for method in grid.tuned):
        console.print(tuning_table(grid))
    if "final" in phases:
        console.print(final_table(grid))
        for what, share in overlaps(grid):
            console.print(f"{what}: modules in common {share:.2f} (Jaccard)")


@app.command(epilog="Example: python -m benchmarks suite --data FOLDER --minutes 60")
def suite(
    file: Annotated[Path, typer.Argument(help="The suite's file.")] = SUITE,
    data: Annotated[
        Path | None, typer.Option(help="The folder of the data sets that the suite names.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A data set, a method, or DATA SET/METHOD."),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Begin no cell after so many minutes.", min=0)
    ] = None,
    jobs: Annotated[int, typer.Option(help="Cells at once, one thread each.", min=1)] = 1,
    costs: Annotated[
        bool, typer.Option("--costs", help="Estimate what is missing, and run nothing.")
    ] = False,
    check: Annotated[
        int, typer.Option(metavar="N", help="Run N finished cells again, and compare.")
    ] = 0,
) -> None:
    """Run the missing cells of the evidence suite, the most needed first, and show it."""
    progress = Console(stderr=True, highlight=False)
    found = read_suite(file, folder=data, only=tuple(only or ()))

    def say(line: str) -> None:
        progress.print(line, markup=False, soft_wrap=True)

    if check:
        if not found.check(check, say):
            raise typer.Exit(1)
        return
    progress.print(costs_table(found))
    if not costs:
        done = found.complete(say, minutes=minutes, jobs=jobs)
        console.print(suite_table(found))
        if not done and minutes is None:
            raise typer.Exit(1)


def main() -> None:
    """Run the command line; errors a user can cause are one sentence on standard error."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except (typer.Abort, KeyboardInterrupt):
        print("Interrupted; the same command goes on from here.", file=sys.stderr)
        sys.exit(130)
    except FedpetError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except click.ClickException as error:
        error.show()
        sys.exit(2)


if __name__ == "__main__":
    main()
