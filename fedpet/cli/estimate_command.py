"""`fedpet estimate`: estimate bytes and seconds before any training."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Annotated

import typer

from fedpet.cli.app import (
    DEFAULT_EXPERIMENT,
    ExperimentName,
    Overrides,
    app,
    out_console,
    write_output,
)
from fedpet.config import StructureConfig
from fedpet.config.builtin import load_experiment
from fedpet.utils.paths import check_output, expand


@app.command(
    epilog="Example: fedpet estimate --model config.json --clients 1000 --set codec.uplink=dither-4"
)
def estimate(
    experiment: ExperimentName = DEFAULT_EXPERIMENT,
    overrides: Overrides = None,
    model: Annotated[
        str,
        typer.Option(
            help="Of another backbone: a name, a folder, or a config.json alone. A structure that "
            "was searched on the experiment's own gives way to LayerNorm gains."
        ),
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
    from fedpet.pet.structure import structure_file
    from fedpet.report.estimate_table import estimate_table

    if model and structure_file(settings.structure.preset):  # searched on the other backbone
        preset = StructureConfig().preset
        settings = replace(settings, structure=replace(settings.structure, preset=preset))
    links = find_links(link or [])
    result = reckon(settings, num_clients=clients, rows_per_client=rows, links=links)
    out_console.show(estimate_table(result))
    if json_file:
        text = json.dumps(result.to_json(), indent=1) + "\n"
        write_output(expand(json_file), text.encode())
        print(f"Numbers: {json_file}")
