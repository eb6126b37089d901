"""Define the Typer application, its output and the options that commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import click
import typer
from rich.console import Console, RenderableType
from typer.core import TyperGroup

from fedpet import __version__
from fedpet.config.value_checks import did_you_mean
from fedpet.errors import InputError

__all__ = [
    "DEFAULT_EXPERIMENT",
    "ExperimentName",
    "Overrides",
    "app",
    "out_console",
    "write_output",
]

DEFAULT_EXPERIMENT = "film-reviews"

ExperimentName = Annotated[
    str,
    typer.Argument(metavar="[EXPERIMENT]", help="A TOML file, or the name of a built-in one."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Overrides one key, e.g. mask.density=0.01."),
]


class Output(Console):
    """Standard output. Tables alone go through it: in other text, "[x]" would be taken as markup.

    `main` handles a pipe that nobody reads.
    """

    def show(self, table: RenderableType) -> None:
        """Print a table; a title that is too long for a line stays whole."""
        self.print(table, crop=False)

    def on_broken_pipe(self) -> None:
        raise  # the error that is being handled


class Commands(TyperGroup):
    """A group of commands that refuses a misspelt one with the nearest."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and self.get_command(ctx, args[0]) is None:
            known = self.list_commands(ctx)
            raise InputError(
                f"there is no command {args[0]!r}. Known are: {', '.join(known)}."
                f"{did_you_mean(args[0], known)}"
            )
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
out_console = Output()


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"fedpet {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", is_eager=True, callback=_show_version),
    ] = False,
) -> None:
    """Fine-tune a pretrained transformer over many devices, sending almost nothing."""


def write_output(path: Path, content: bytes) -> None:
    """Write a file for the user.

    Raises:
        InputError: It cannot be written.
    """
    try:
        path.write_bytes(content)
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be written: {error.strerror or error}.") from None
