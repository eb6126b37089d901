"""`fedpet init`: write a commented experiment for the user's own data."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

from fedpet.cli.app import app
from fedpet.errors import DataError, InputError
from fedpet.utils.paths import absolute, check_output, expand

EVALUATION = ("test", "validation", "dev", "valid", "eval")


@app.command(epilog="Example: fedpet init reviews.csv; fedpet simulate reviews.toml")
def init(
    data: Annotated[str, typer.Argument(help="A file, a folder with split files, or a hub name.")],
    out: Annotated[
        str, typer.Option(help="The experiment to make; the data's name and .toml where left out.")
    ] = "",
    text_column: Annotated[
        list[str] | None, typer.Option(help="Given twice for pairs of texts; else guessed.")
    ] = None,
    label_column: Annotated[str, typer.Option(help="Else guessed.")] = "",
    client_column: Annotated[str, typer.Option(help="Else guessed, or clients are made.")] = "",
) -> None:
    """Write an experiment for your data, after a look at its columns. Overwrites nothing."""
    stem = Path(data.rstrip("/").partition("@")[0]).name.partition(".")[0] or "experiment"
    path = expand(out or f"{stem}.toml")
    if path.suffix != ".toml":
        raise InputError(f"an experiment is a .toml file, got --out {out!r}.")
    if path.exists():
        raise InputError(f"{str(path)!r} is there already: name another with --out.")
    check_output(path)
    if len(text_column or ()) > 2:
        raise InputError("--text-column names one column, or two for pairs of texts.")

    from fedpet.cli.column_guess import guess_columns
    from fedpet.cli.experiment_text import experiment_text
    from fedpet.config import Experiment
    from fedpet.data.local_files import Files
    from fedpet.data.open_source import open_source

    source = open_source(data)
    splits = sorted(source.files) if isinstance(source, Files) else []
    if splits and splits != [""] and "train" not in splits:
        raise InputError(
            f"{source.description} has no training rows: name a file 'train' with its format's "
            f"suffix. It has the splits {', '.join(splits)}."
        )
    table = source.read("train")
    if not table.num_rows:
        raise DataError(f"{source.description} has no rows.")
    values = {name: table.labels(name, "", source.description) for name in table.column_names}
    columns = guess_columns(
        values, texts=text_column or (), label=label_column, client=client_column
    )
    evaluation = next((name for name in EVALUATION if name in splits), "")
    local = Path(data).expanduser()
    where = str(absolute(local)) if local.exists() else data
    text = experiment_text(where, columns, evaluation, table.num_rows)
    tables: dict[str, Any] = tomllib.loads(text)
    Experiment.from_tables(tables)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be written: {error.strerror or error}.") from None
    texts = " and ".join(map(json.dumps, columns.texts))
    print(f"Texts: {texts}   Label: {json.dumps(columns.label)}", end="   ")
    print(f"Clients: {json.dumps(columns.client) if columns.client else 'made from the labels'}")
    print(f"Experiment: {path}   Read it, then run it: fedpet simulate {path}")
