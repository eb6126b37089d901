"""`fedpet import`: write an experiment from the settings of another program."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fedpet.cli.app import app, write_output
from fedpet.errors import InputError
from fedpet.utils.paths import check_output, expand

FORMATS = ("flowertune",)


@app.command("import", epilog="Example: fedpet import flowertune pyproject.toml --out mine.toml")
def import_settings(
    program: Annotated[str, typer.Argument(help="flowertune, an app of Flower's LLM leaderboard.")],
    file: Annotated[Path, typer.Argument(help="Its pyproject.toml.")],
    out: Annotated[str, typer.Option(help="The experiment to write; else it is printed.")] = "",
    clients: Annotated[
        int, typer.Option(min=0, help="Partitions of the data; 0 takes the file's num-supernodes.")
    ] = 0,
) -> None:
    """Write an experiment from another program's settings; say which have no counterpart."""
    from fedpet.config.flowertune import read_flowertune

    if program not in FORMATS:
        raise InputError(
            f"settings can be read of {', '.join(FORMATS)}, got {program!r}: name one of these, "
            "then its file."
        )
    if out:
        check_output(expand(out))
    found = read_flowertune(file, num_clients=clients)
    text = found.to_toml(str(file))
    if not out:
        print(text, end="")
        return
    write_output(expand(out), text.encode())
    print(f"Experiment: {out}   Run it: fedpet simulate {out}")
    for key, reason in found.without.items():
        print(f"no counterpart: {key} ({reason})", file=sys.stderr)
