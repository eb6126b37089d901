"""`fedpet search`: search a structure, centrally or on the clients."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from fedpet.cli.app import DEFAULT_EXPERIMENT, ExperimentName, Overrides, app, out_console
from fedpet.config.builtin import load_experiment
from fedpet.utils.paths import check_output, expand


@app.command(epilog="Example: fedpet search film-reviews --set search.budget=0.001")
def search(
    experiment: ExperimentName = DEFAULT_EXPERIMENT,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="The file to make.")] = Path("structure.json"),
    federated: Annotated[
        bool,
        typer.Option("--federated", help="On the experiment's clients, each with its own rows."),
    ] = False,
) -> None:
    """Search which small module goes where, under a budget (S3PET), on all training rows together.

    With --federated the clients search, in rounds, and the server averages and settles. The file is
    for structure.file of any experiment with the same backbone; `fedpet simulate` with
    search.federated = true searches and trains in one run. A search that was stopped goes on by the
    same command. search.method = "random" draws a structure under the same
    budget, and presets such as "lnfit+lora" are put under it; budgets are values (2000), a
    fraction of the backbone (0.001), or bytes of a client's upload ("8kB").
    """
    settings, out = load_experiment(experiment, overrides or []), expand(out)
    if out.parent.exists():  # else it is made
        check_output(out)

    from fedpet.report.gate_tables import structure_table

    if federated or settings.search.federated:
        from fedpet.run.progress import Progress
        from fedpet.run.ray_engine import search as search_together

        rounds = settings.search.rounds
        with Progress(rounds, settings.data.metric, rounds) as bar:
            structure = search_together(settings, out, bar)
    else:
        from fedpet.run.central_search import search_centrally
        from fedpet.run.progress import SearchBar

        with SearchBar() as progress:
            structure = search_centrally(settings, out, progress)
    out_console.show(structure_table(structure))
    print(f"Structure: {out}   Train it: --set structure.file={quote(str(out))}")
