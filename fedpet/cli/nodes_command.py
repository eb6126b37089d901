"""`fedpet nodes`: list a deployment's nodes, add and remove them, replace keys and certificates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fedpet.cli.app import app, out_console
from fedpet.utils.paths import expand


@app.command(
    epilog="Example: fedpet nodes deployment      fedpet nodes deployment --add ward-3\n\n"
    "On the server, the folder is that of the server."
)
def nodes(
    folder: Annotated[
        Path, typer.Argument(help="A deployment's folder, or on the server the server's.")
    ],
    add: Annotated[
        list[str] | None, typer.Option(metavar="NAME[=DATA]", help="A node to add. Repeatable.")
    ] = None,
    remove: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A node to take out. Repeatable.")
    ] = None,
    rotate: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A node to give a new key. Repeatable.")
    ] = None,
    renew_certificate: Annotated[
        bool, typer.Option("--renew-certificate", help="Make the server a new certificate.")
    ] = False,
    renew_authority: Annotated[
        bool, typer.Option("--renew-authority", help="Make a new authority beside the old one.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show who is there, with bytes and refusals; or change who may come."""
    from fedpet.deploy import membership
    from fedpet.deploy.deployment import NodeSpec
    from fedpet.deploy.node_table import last_refusals, list_nodes, node_table

    folder = expand(folder)
    done = [membership.add_node(folder, NodeSpec.parse(text)) for text in add or []]
    done += [membership.remove_node(folder, name) for name in remove or []]
    done += [membership.rotate_key(folder, name) for name in rotate or []]
    if renew_authority:
        done.append(membership.renew_authority(folder))
    if renew_certificate:
        done.append(membership.renew_certificate(folder))
    for sentence in done:
        print(sentence)
    if not done:
        lines = list_nodes(folder)
        if as_json:
            print(json.dumps(lines, indent=1))
        else:
            out_console.show(node_table(lines))
            for sentence in last_refusals(lines):
                print(sentence)
