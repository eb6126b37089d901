"""`python -m benchmarks`: one baseline, or the whole table. Runs from a checkout.

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
from rich.table import Table

from benchmarks.baselines import METHODS, run_baseline
from benchmarks.federated_search import PHASES as FEDERATED_PHASES
from benchmarks.federated_search import FederatedSearchRun, FederatedSearchTable, overlaps
from benchmarks.federated_search import final_table as structures_table
from benchmarks.search_table import PHASES as SEARCH_PHASES
from benchmarks.search_table import SearchTable, SearchTableRun
from benchmarks.search_table import final_table as searched_table
from benchmarks.search_table import overlaps as searched_overlaps
from benchmarks.search_table import tuning_table as searched_tuning
from benchmarks.table import FEDPET, PHASES, TableFile, TableRun
from fedpet.client.node_config import cache_folder
from fedpet.config import Experiment
from fedpet.config.builtin import experiment_file
from fedpet.errors import ConfigError, FedpetError, InputError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="What fedpet is compared with, on the same clients, seeds, rounds and evaluation.",
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
    file: Annotated[Path, typer.Argument(help="What to run: methods, grids, splits, seeds.")],
    phase: Annotated[str, typer.Option(help="tune or final; both where it is left out.")] = "",
    only: Annotated[
        list[str] | None, typer.Option(metavar="METHOD", help="Leave the other methods out.")
    ] = None,
    check: Annotated[
        int, typer.Option(metavar="N", help="Run N finished cells again, and compare.")
    ] = 0,
) -> None:
    """Run what is missing of a table, cell by cell, and show it. Interrupt and resume at will."""
    if phase not in ("", *PHASES):
        raise ConfigError(f"--phase must be one of {', '.join(PHASES)}, got {phase!r}.")
    phases = (phase,) if phase else PHASES
    progress = Console(stderr=True, highlight=False)
    job = TableRun(
        TableFile.read(file),
        lambda line: progress.print(line, markup=False, soft_wrap=True),
        only=tuple(only or ()),
    )
    if check:
        if not job.check(check, phases):
            raise typer.Exit(1)
        return
    if "tune" in phases:
        job.tune()
        if any(len(method.rates) > 1 for method in job.methods):
            console.print(tuning_table(job))
    if "final" in phases:
        job.final()
        show_finals(job)


@app.command(
    name="search_table",
    epilog="Example: python -m benchmarks search_table "
    "benchmarks/search.toml --data FOLDER --jobs 2",
)
def search_table(
    file: Annotated[Path, typer.Argument(help="What to run: data sets, budgets, grids, seeds.")],
    data: Annotated[Path, typer.Option(help="The folder that holds the data sets' folders.")],
    phase: Annotated[
        str, typer.Option(help=f"{', '.join(SEARCH_PHASES)}; all where it is left out.")
    ] = "",
    jobs: Annotated[int, typer.Option(help="Cells at once, one thread each.", min=1)] = 1,
    check: Annotated[
        int, typer.Option(metavar="N", help="Run N finished cells again, and compare.")
    ] = 0,
) -> None:
    """Run what is missing of a table of structures, and show it. Interrupt and resume at will."""
    if phase not in ("", *SEARCH_PHASES):
        raise ConfigError(f"--phase must be one of {', '.join(SEARCH_PHASES)}, got {phase!r}.")
    phases = (phase,) if phase else SEARCH_PHASES
    progress = Console(stderr=True, highlight=False)
    job = SearchTableRun(
        SearchTable.read(file),
        data,
        cache_folder(Experiment()),
        lambda line: progress.print(line, markup=False, soft_wrap=True),
        jobs=jobs,
    )
    if check:
        if not job.check(check, phases):
            raise typer.Exit(1)
        return
    job.complete(phases)
    if "tune" in phases:
        console.print(searched_tuning(job))
    if "final" in phases:
        console.print(searched_table(job))
        for budget, what, overlap in searched_overlaps(job):
            console.print(f"budget {budget}, {what}: modules in common {overlap:.2f} (Jaccard)")


@app.command(
    name="federated_search",
    epilog="Example: python -m benchmarks federated_search benchmarks/federated_search.toml",
)
def federated_search(
    file: Annotated[Path, typer.Argument(help="What to run: an experiment, rates, splits, seeds.")],
    phase: Annotated[
        str, typer.Option(help=f"{', '.join(FEDERATED_PHASES)}; all where it is left out.")
    ] = "",
    check: Annotated[
        int, typer.Option(metavar="N", help="Run N finished cells again, and compare.")
    ] = 0,
) -> None:
    """Run what is missing of the table of federated search, and show it. Resume at will."""
    if phase not in ("", *FEDERATED_PHASES):
        raise ConfigError(f"--phase must be one of {', '.join(FEDERATED_PHASES)}, got {phase!r}.")
    phases = (phase,) if phase else FEDERATED_PHASES
    progress = Console(stderr=True, highlight=False)
    job = FederatedSearchRun(
        FederatedSearchTable.read(file),
        lambda line: progress.print(line, markup=False, soft_wrap=True),
    )
    if check:
        if not job.check(check, phases):
            raise typer.Exit(1)
        return
    job.complete(phases)
    if "final" in phases:
        console.print(structures_table(job))
        for what, overlap in overlaps(job):
            console.print(f"{what}: modules in common {overlap:.2f} (Jaccard)")


def tuning_table(job: TableRun) -> Table:
    """The metric at each rate; the one taken is in bold."""
    columns = max(len(method.rates) for method in job.methods)
    title = f"tuned on {job.table.tune_split!r}, seed {job.table.tune_seed}"
    shown = Table(title=title, title_justify="left", box=None)
    shown.add_column("method")
    for _ in range(columns):
        shown.add_column("rate: metric", justify="right")
    shown.add_column("")
    for method in job.methods:
        tuned, best = job.tuned(method), job.best_rate(method)
        cells = []
        for rate in sorted(method.rates):
            text = f"{rate}: {tuned[rate]:.4f}" if rate in tuned else f"{rate}: nothing learned"
            cells.append(f"[bold]{text}[/bold]" if rate == best else text)
        at_edge = best in (min(method.rates), max(method.rates))
        shown.add_row(method.name, *cells, "at the edge of its grid" if at_edge else "")
    return shown


def show_finals(job: TableRun) -> None:
    """The table of `fedpet compare` over the final cells."""
    from fedpet.report.compare import compare_table
    from fedpet.report.results import read_results

    console.print(compare_table(read_results(job.final_results())))


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
