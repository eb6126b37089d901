"""The command line. Stands above everything; nothing imports it.

Exit codes: 0 done; 1 the run failed or nothing was learned; 2 bad input, one clear sentence;
70 what nobody foresaw, and where its traceback is; 130 interrupted (143 by SIGTERM), and how to go
on with it; 141 whoever read the output has gone.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Annotated

import click
import typer
from rich.console import Console, RenderableType

import fedpet
from fedpet.cli.faults import is_of_paths, report_fault, watched_outputs
from fedpet.config.builtin import load_experiment
from fedpet.errors import FedpetError, InputError, RunInterrupted
from fedpet.utils.paths import NO_HOME, check_output, expand, give_no_home, replace_home

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Fine-tune a pretrained transformer over many devices, sending almost nothing.",
)


class Output(Console):
    """Standard output. Tables alone go through it: in other text, "[x]" would be taken as markup.

    A pipe that nobody reads is for `main` to deal with.
    """

    def show(self, table: RenderableType) -> None:
        """Print a table; a title that is too long for a line stays whole."""
        self.print(table, crop=False)

    def on_broken_pipe(self) -> None:
        raise  # the error that is being handled


out_console = Output()
DEFAULT_EXPERIMENT = "film-reviews"

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Overrides one key, e.g. mask.density=0.01."),
]


@app.command(
    epilog="Example: fedpet simulate --set strategy.num-rounds=4 --set run.seed=1 --out runs/try"
)
def simulate(
    experiment: Annotated[
        str,
        typer.Argument(
            metavar="[EXPERIMENT]",
            help="A TOML file, or the name of a built-in one.",
        ),
    ] = DEFAULT_EXPERIMENT,
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
        settings = load_experiment(experiment, overrides or [])
        run = fedpet.simulate(settings, out=out)

    from fedpet.report.run_table import run_table

    out_console.show(run_table(run.result))
    print(f"Run folder: {run.folder}   Plain model: {run.folder / 'model'}")


@app.command(epilog="Example: fedpet search film-reviews --set search.budget=0.001")
def search(
    experiment: Annotated[
        str, typer.Argument(help="A TOML file, or the name of a built-in one.")
    ] = "film-reviews",
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


@app.command(epilog="Example: fedpet mask bundled --density 0.005")
def mask(
    model: Annotated[
        str, typer.Argument(help="bundled, a hub name, a folder, or package:NAME.")
    ] = "bundled",
    density: Annotated[float, typer.Option(help="Fraction of the entries in scope.")] = 0.005,
    rule: Annotated[str, typer.Option(help="smallest (PaFi), largest or random.")] = "smallest",
    granularity: Annotated[str, typer.Option(help="global or per-tensor.")] = "global",
    out: Annotated[
        str, typer.Option(help="Write the coded positions to this file, the explicit broadcast.")
    ] = "",
) -> None:
    """Build the magnitude mask of a model; show densities, and bytes against the entropy bound."""
    from fedpet.backbone.module_roles import maskable_weights
    from fedpet.backbone.pretrained import load_backbone
    from fedpet.config import BackboneConfig, MaskConfig
    from fedpet.pet.mask import build_mask
    from fedpet.protocol.plan import encode_mask
    from fedpet.report.mask_table import mask_table

    if out:
        check_output(expand(out))
    config = MaskConfig(density=density, rule=rule, granularity=granularity)
    backbone = load_backbone(BackboneConfig(model=model), num_outputs=2)
    built = build_mask(maskable_weights(backbone.model, backbone.head), config)
    coded = encode_mask(built)
    out_console.show(mask_table(built, config, backbone.model, len(coded)))
    if out:
        write_output(expand(out), coded)
        print(f"Positions: {out}")


@app.command(
    epilog="Example: fedpet deploy film-reviews --host fed.example.org --node ward-1 --node ward-2 "
    "--out deployment"
)
def deploy(
    experiment: Annotated[
        str, typer.Argument(metavar="EXPERIMENT", help="A TOML file, or a built-in one's name.")
    ],
    host: Annotated[str, typer.Option(help="Name or address under which nodes reach the server.")],
    node: Annotated[
        list[str],
        typer.Option(
            metavar="NAME[=DATA]",
            help="A node, and where its rows lie on it (data.jsonl beside its script). Repeatable.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder to make.")],
    overrides: Overrides = None,
    port: Annotated[int, typer.Option(help="The server's one port.")] = 8000,
    bind: Annotated[str, typer.Option(help="Address the server listens on.")] = "0.0.0.0",
    client_column: Annotated[
        str, typer.Option(help="Column that tells a node's clients apart; else each node is one.")
    ] = "",
    clients: Annotated[
        int, typer.Option(help="Clients to wait for before the first round; 0: one a node.")
    ] = 0,
    threads: Annotated[int, typer.Option(help="Torch threads a node; 0: the experiment's.")] = 0,
    node_port: Annotated[
        int, typer.Option(help="Port of the first node's own processes, on its machine only.")
    ] = 8100,
    backbone: Annotated[str, typer.Option(help="The checkpoint's folder on the nodes.")] = "",
    install: Annotated[
        str, typer.Option(help="Where the folders will lie, for systemd.")
    ] = "/opt/fedpet",
    days: Annotated[int, typer.Option(help="For how long the certificates are valid.")] = 365,
) -> None:
    """Make a folder with all that a server and real nodes need: keys, certificates, scripts."""
    from fedpet.deploy import Deployment, NodeSpec, write_deployment

    deployment = Deployment(
        experiment=load_experiment(experiment, overrides or []),
        host=host,
        nodes=tuple(NodeSpec.parse(text) for text in node),
        port=port,
        bind=bind,
        client_column=client_column,
        clients=clients,
        threads=threads,
        node_port=node_port,
        backbone=backbone,
        install=install,
        days=days,
    )
    out = expand(out)
    write_deployment(deployment, out)
    print(f"Deployment: {out}   What to do next: {out / 'README.md'}")


@app.command(epilog="Example: fedpet merge runs/film-reviews-1 --out my-model")
def merge(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    out: Annotated[Path, typer.Option(help="The Hugging Face folder to make.")],
) -> None:
    """Fold a run's values into a plain Hugging Face model."""
    from fedpet.run.merge import merge_run

    run, out = expand(run), expand(out)
    merge_run(run, out)
    print(f"Plain model: {out}")


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


@app.command(
    epilog="Example: fedpet estimate --model config.json --clients 1000 --set codec.uplink=eden-4"
)
def estimate(
    experiment: Annotated[
        str,
        typer.Argument(
            metavar="[EXPERIMENT]",
            help="A TOML file, or the name of a built-in one.",
        ),
    ] = "film-reviews",
    overrides: Overrides = None,
    model: Annotated[
        str,
        typer.Option(help="Of another backbone: a name, a folder, or a config.json alone."),
    ] = "",
    clients: Annotated[
        int | None, typer.Option(help="How many there are; else they are counted in the data.")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(help="Rows a client holds, with --clients. 32 if not told.")
    ] = None,
    link: Annotated[
        list[str] | None,
        typer.Option(help="lorawan, nb-iot, lte-m, 4g or wifi; all by default. Repeatable."),
    ] = None,
    json_file: Annotated[
        str, typer.Option("--json", metavar="FILE", help="Write the same numbers to this file.")
    ] = "",
) -> None:
    """Say what a run would cost in bytes, and in time on named links, before any training."""
    settings = load_experiment(experiment, overrides or [])
    if json_file:
        check_output(expand(json_file))
    if model:
        settings = replace(settings, backbone=replace(settings.backbone, model=model))

    from fedpet.estimate import estimate as reckon
    from fedpet.estimate import find_links
    from fedpet.report.estimate_table import estimate_table

    links = find_links(link or [])
    result = reckon(settings, num_clients=clients, rows_per_client=rows, links=links)
    out_console.show(estimate_table(result))
    if json_file:
        text = json.dumps(result.to_json(), indent=1) + "\n"
        write_output(expand(json_file), text.encode())
        print(f"Numbers: {json_file}")


def write_output(path: Path, content: bytes) -> None:
    """Write a file for the user."""
    try:
        path.write_bytes(content)
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be written: {error.strerror or error}.") from None


def main() -> None:
    """Run the command line; whatever goes wrong is one sentence on standard error."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    replace_home()
    with watched_outputs() as nobody_reads:
        code = _run(nobody_reads)
    if code:
        sys.exit(code)


def _run(nobody_reads: Callable[[], bool]) -> int:
    try:
        code: int = app(standalone_mode=False)
        if code == 130:  # how Typer puts an interrupt
            print("Interrupted.", file=sys.stderr)
        if sys.stdout is not None:  # else it was closed from the start
            sys.stdout.flush()
    except (typer.Abort, KeyboardInterrupt):
        print("Interrupted.", file=sys.stderr)
        code = 130
    except RunInterrupted as stopped:
        print(stopped, file=sys.stderr, flush=True)
        code = stopped.exit_code
        if sum(not thread.daemon for thread in threading.enumerate()) > 1:
            # Flower's server would be waited for, in a thread that is not told.
            sys.stdout.flush()
            os._exit(code)
    except FedpetError as error:
        code = _fail(str(error), 2 if isinstance(error, InputError) else 1)
    except click.ClickException as error:
        error.show()
        code = 2
    except SystemExit as ended:  # Typer's and Rich's way out of a closed pipe
        if not isinstance(ended.__context__, BrokenPipeError):
            raise
        code = _unforeseen(ended.__context__, nobody_reads)
    except Exception as error:
        code = _unforeseen(error, nobody_reads)
    return code or 0


def _unforeseen(error: Exception, nobody_reads: Callable[[], bool]) -> int:
    """Say what went wrong that no code says; gives the exit code."""
    if isinstance(error, BrokenPipeError) and nobody_reads():
        _say_no_more(1, 2)
        return 141
    if isinstance(error, RuntimeError) and str(error) == NO_HOME:
        return _fail(str(give_no_home()), 2)
    if isinstance(error, OSError) and is_of_paths(error, sys.argv[1:]):
        return _fail(f"{error.filename!r} cannot be used: {error.strerror}.", 2)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        _say_no_more(1)
        what = repr(error.filename) if error.filename else "the output"
        return _fail(f"{what} cannot be written: {error.strerror}. Make room.", 1)
    return _fail(report_fault(error), 70)


def _say_no_more(*descriptors: int) -> None:
    """Lose what is still to be written there, which at the process's end would fail once more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in descriptors:
        os.dup2(nowhere, descriptor)


def _fail(sentence: str, code: int) -> int:
    print(f"Error: {sentence}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
