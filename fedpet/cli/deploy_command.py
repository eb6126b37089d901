"""`fedpet deploy`: write the folders that real nodes and their server need."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedpet.cli.app import Overrides, app
from fedpet.config.builtin import load_experiment
from fedpet.utils.paths import expand


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
    port: Annotated[int, typer.Option(help="The server's one port that nodes reach.")] = 8000,
    bind: Annotated[
        str, typer.Option(help="Address the server listens on; 0.0.0.0 for nodes elsewhere.")
    ] = "127.0.0.1",
    own_port: Annotated[
        int, typer.Option(help="SuperLink's port on the server's loopback; the monitor's is next.")
    ] = 8001,
    client_column: Annotated[
        str, typer.Option(help="Column that tells a node's clients apart; else each node is one.")
    ] = "",
    clients_per_node: Annotated[int, typer.Option(help="Most clients that a node may bring.")] = 1,
    max_rows: Annotated[
        int, typer.Option(help="Most rows that a client may say it holds; 0: no bound.")
    ] = 0,
    reply_mib: Annotated[int, typer.Option(help="Most MiB of one reply of a node.")] = 64,
    clients: Annotated[
        int, typer.Option(help="Clients to wait for before the first round; 0: one a node.")
    ] = 0,
    threads: Annotated[int, typer.Option(help="Torch threads a node; 0: the experiment's.")] = 0,
    isolation: Annotated[
        str,
        typer.Option(
            help="Where a node answers: 'process', a worker that stays and never executes the "
            "server's bundle; 'subprocess', a new process of Flower's for each message."
        ),
    ] = "process",
    node_port: Annotated[
        int, typer.Option(help="Port of the first node's own processes, on its machine only.")
    ] = 8100,
    backbone: Annotated[str, typer.Option(help="The checkpoint's folder on the nodes.")] = "",
    install: Annotated[
        str, typer.Option(help="Where the folders will lie, for systemd.")
    ] = "/opt/fedpet",
    days: Annotated[int, typer.Option(help="For how long the certificates are valid.")] = 365,
    script: Annotated[
        str,
        typer.Option(help="A Python file on the nodes, whose Trainer trains their clients."),
    ] = "",
) -> None:
    """Make a folder with all that a server and real nodes need: keys, certificates, scripts."""
    from fedpet.deploy import Deployment, NodeSpec, write_deployment

    deployment = Deployment(
        experiment=load_experiment(experiment, overrides or []),
        host=host,
        nodes=tuple(NodeSpec.parse(text) for text in node),
        port=port,
        bind=bind,
        own_port=own_port,
        clients_per_node=clients_per_node,
        max_rows=max_rows,
        reply_mib=reply_mib,
        client_column=client_column,
        clients=clients,
        threads=threads,
        isolation=isolation,
        node_port=node_port,
        backbone=backbone,
        install=install,
        days=days,
        script=script,
    )
    out = expand(out)
    write_deployment(deployment, out)
    print(f"Deployment: {out}   What to do next: {out / 'README.md'}")
