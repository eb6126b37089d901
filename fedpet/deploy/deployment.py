"""Write a deployment's folder: the server's part, and each node's.

    DIR/
      README.md           what to do, in order
      deployment.toml     how it was made, for `fedpet nodes`
      authority/          the authority's key: on neither machine
      server/             superlink.sh, register.sh, run.sh, the app, certificates
        nodes/            who may take part: a public key and bounds a node
      nodes/NAME/         supernode.sh, node.toml, the node's key, the authority's certificate
      compose.yaml        all of it on one machine, to try it, in the image of the Dockerfile

Nothing in it is ever written over: keys that nodes already hold would be lost. All of it is for its
owner alone (0600 under 0700), since updates and keys lie in it. Each script stands
in the folder it is about and runs from anywhere; `$FEDPET_VENV` names a virtual environment whose
commands it uses, else they come from the path.
"""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path

import tomli_w

from fedpet.config import Experiment
from fedpet.deploy.certificates import make_certificates, make_node_key
from fedpet.deploy.flower_app import PACKAGES_FILE, TEMPLATES, packages, write_app
from fedpet.errors import ConfigError
from fedpet.server.allowed_nodes import MAX_ROWS
from fedpet.utils.atomic_write import atomic_write
from fedpet.utils.paths import absolute, expand
from fedpet.utils.templating import render

# Names in the server's certificate beside its own: its processes', and its service's in compose.
LOCAL = ("localhost", "127.0.0.1", "fedpet-server")
OWN_PORT, NODE_PORT = 8001, 8100
ISOLATIONS = ("process", "subprocess")
MAX_DAYS = 36_500
FACTS = "deployment.toml"
COMPOSE = "compose.yaml"
# What `add_node_files` writes into a node's folder; the rest of it is the device's.
NODE_FILES = ("ca.crt", "fedpet-supernode.service", "node.key", "node.toml", "supernode.sh")
MAX_CLIENTS = 100_000  # of a node, as a registration has them
CONTAINER_UID = 10_001  # in containers of a deployment that root has made
_NODE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_HOST = re.compile(r"[A-Za-z0-9:][A-Za-z0-9.:-]{0,252}")


@dataclass(frozen=True)
class NodeSpec:
    """Name one node and its rows.

    Attributes:
        name: Of its folder and key; the client's name too, where it holds one client.
        data: Its rows: a file or folder, as the device sees it from its folder.
        port: Of its own processes; 0 until `with_ports` gives it one.
    """

    name: str
    data: str = "data.jsonl"
    port: int = 0

    def __post_init__(self) -> None:
        if not _NODE_NAME.fullmatch(self.name):
            raise ConfigError(
                f"a node's name is letters, digits, '.', '_' and '-', 63 at most, got "
                f"{self.name!r}: it names a folder and a key."
            )

    @classmethod
    def parse(cls, text: str) -> NodeSpec:
        """Read "NAME", or "NAME=DATA"."""
        name, equals, data = text.partition("=")
        return cls(name, data) if equals else cls(name)


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """Say what is deployed, and where.

    Attributes:
        experiment: What to run; its clients are those that the nodes bring.
        host: Name or address under which nodes reach the server.
        nodes: Those that are let in.
        port: The server's one port that nodes reach, which its relay listens on.
        bind: The address that the relay listens on; the loopback unless named.
        own_port: SuperLink's, on the server's loopback; health and metrics are one higher.
        client_column: The column that tells a node's clients apart; "" for one client a node,
            named as the node is.
        clients_per_node: Most clients that a node may bring.
        max_rows: Most rows that a client may say it holds; 0 sets no bound.
        reply_mib: Most MiB of one reply of a node.
        clients: How many to wait for before the first round; 0 for as many as there are nodes.
        threads: Torch threads a node; 0 leaves it to the experiment.
        isolation: Flower's word for where a node answers messages: "process" in a worker that stays
            (fedpet/client/supernode.py), "subprocess" in a new process of Flower's for each, which
            executes the server's bundle.
        node_port: Of the first node's own processes; each further node takes the next port that
            no other has, so that nodes can share a machine.
        backbone: The checkpoint's folder on the nodes, where the experiment's name does not do.
        install: Where the folders will lie on their machines, for the systemd units.
        days: For how long the server's certificate is valid; its authority is ten times as long.
        script: A script whose Trainer trains a node's clients, as the node sees it from its folder;
            "" is fedpet's own loop.
    """

    experiment: Experiment
    host: str
    nodes: tuple[NodeSpec, ...]
    port: int = 8000
    bind: str = "127.0.0.1"
    own_port: int = OWN_PORT
    client_column: str = ""
    clients_per_node: int = 1
    max_rows: int = 0
    reply_mib: int = 64
    clients: int = 0
    threads: int = 0
    isolation: str = "process"
    node_port: int = NODE_PORT
    backbone: str = ""
    install: str = "/opt/fedpet"
    days: int = 365
    script: str = ""

    def __post_init__(self) -> None:
        names = [node.name for node in self.nodes]
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"a deployment has one node or more, each name once, got {names}.")
        for what, host in (("host", self.host), ("bind", self.bind)):
            if not _HOST.fullmatch(host):
                raise ConfigError(
                    f"the {what} is the name or address under which nodes reach the server, got "
                    f"{host!r}."
                )
        if self.isolation not in ISOLATIONS:
            raise ConfigError(
                f"the isolation is one of {', '.join(ISOLATIONS)}, got {self.isolation!r}."
            )
        if self.script and self.isolation != "process":
            raise ConfigError(
                "a node's script is run by a worker that stays: leave --isolation subprocess out."
            )
        last_node_port = self.node_port + len(names) - 1
        ports = {"port": self.port, "own port": self.own_port, "node port": last_node_port}
        for name, port in ports.items():
            if not 1 <= port <= 65534:
                raise ConfigError(f"the {name} must be in 1 ... 65534, got {port}.")
        if self.own_port <= self.port <= self.own_port + 1:
            raise ConfigError(
                f"the port {self.port} is taken by SuperLink or the monitor, at the own port "
                f"{self.own_port} and the one after it: name another."
            )
        if not 1 <= self.clients_per_node <= MAX_CLIENTS or not 1 <= self.reply_mib <= 4096:
            raise ConfigError(
                f"a node brings 1 ... {MAX_CLIENTS} clients and a reply has 1 ... 4096 MiB, got "
                f"{self.clients_per_node} and {self.reply_mib}."
            )
        if not 0 <= self.max_rows <= MAX_ROWS:
            raise ConfigError(f"max rows is in 0 ... {MAX_ROWS}, got {self.max_rows}.")
        if not 1 <= self.days <= MAX_DAYS or self.clients < 0 or self.threads < 0:
            raise ConfigError(
                f"days is in 1 ... {MAX_DAYS}, clients and threads are at least 0, got "
                f"{self.days}, {self.clients} and {self.threads}."
            )

    @property
    def address(self) -> str:
        """Return the server's address, "host:port"."""
        return _address(self.host, self.port)

    @property
    def own_address(self) -> str:
        """Return SuperLink's address on the server's machine, which no other machine reaches."""
        return _address("127.0.0.1", self.own_port)

    @property
    def server_names(self) -> tuple[str, ...]:
        """Return the names and addresses in the server's certificate."""
        return (self.host, *LOCAL)

    @property
    def authority_days(self) -> int:
        """Return for how long the authority is valid: nodes keep its certificate for longer."""
        return min(10 * self.days, MAX_DAYS)

    def server_experiment(self) -> Experiment:
        """Return the experiment as the server runs it: the clients are the nodes'."""
        given = self.experiment
        clients = self.clients or len(self.nodes)
        return replace(
            given,
            run=replace(given.run, out="", cache="cache", start=_whole(given.run.start)),
            backbone=replace(given.backbone, model=_whole(given.backbone.model)),
            data=replace(given.data, source=_whole(given.data.source)),
            structure=replace(given.structure, file=_whole(given.structure.file)),
            clients=replace(
                given.clients,
                partition="nodes",
                num_clients=clients,
                node_keys="nodes",
                script="",  # each node's own
            ),
        )

    def bounds(self) -> dict[str, int]:
        """Return what a node may bring, see fedpet/server/allowed_nodes.py."""
        rows = {"rows": self.max_rows} if self.max_rows else {}
        return {"clients": self.clients_per_node, **rows}

    def node_config(self, node: NodeSpec) -> dict[str, str | int]:
        """Return the content of a node's node.toml, see fedpet/client/node_config.py."""
        columns = self.experiment.data  # pinned: a server cannot have another column read
        config: dict[str, str | int] = {
            "data": node.data,
            "text-columns": ",".join(columns.text_columns),
            "label-column": columns.label_column,
        }
        if self.client_column:
            config["client-column"] = self.client_column
        else:
            config["client"] = node.name
        if self.backbone:
            config["backbone"] = self.backbone
        if self.threads:
            config["threads"] = self.threads
        return {**config, "cache": "cache"}


def with_ports(deployment: Deployment) -> Deployment:
    """Give each node without a port of its own processes the lowest that no other node has."""
    taken = {node.port for node in deployment.nodes}
    free = (port for port in count(deployment.node_port) if port not in taken)
    nodes = (node if node.port else replace(node, port=next(free)) for node in deployment.nodes)
    return replace(deployment, nodes=tuple(nodes))


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
            _write_all(with_ports(deployment), made)
            os.replace(made, folder)
    except OSError as error:
        raise ConfigError(f"the folder {str(folder)!r} cannot be written: {error}.") from None


def _write_all(deployment: Deployment, folder: Path) -> None:
    certificates = make_certificates(
        deployment.server_names, days=deployment.days, authority_days=deployment.authority_days
    )
    write_facts(deployment, folder)
    write_new(folder / "authority" / "ca.key", certificates.authority_key)
    write_new(folder / "authority" / "ca.crt", certificates.authority)
    facts = {
        "address": deployment.address,
        "bind": deployment.bind,
        "client_column": deployment.client_column,
        "days": deployment.days,
        "host": deployment.host,
        "num_nodes": len(deployment.nodes),
        "packages_file": PACKAGES_FILE if packages(deployment.experiment) else "",
        "own_port": deployment.own_port,
        "port": deployment.port,
        **_container_user(),
        "source": deployment.server_experiment().data.source,
        "waits_for": deployment.clients or len(deployment.nodes),
    }
    for name in ("Dockerfile", "README.md"):
        write_new(folder / name, render(TEMPLATES / f"{name}.j2", **facts))
    write_new(folder / COMPOSE, compose_file(deployment))
    server = folder / "server"
    write_new(server / "ca.crt", certificates.authority)
    write_new(server / "server.pem", certificates.server)
    write_new(server / "server.key", certificates.server_key)
    _write_server(deployment, server)
    for node in deployment.nodes:
        add_node_files(deployment, folder, node)
    for path in folder.rglob("*"):  # copied files came with modes of their own
        path.chmod(path.stat().st_mode & 0o700)


def add_node_files(deployment: Deployment, folder: Path, node: NodeSpec) -> None:
    """Write the files of one node of a deployment, and its key and bounds on the server."""
    server, place = folder / "server", folder / "nodes" / node.name
    write_key(server / "nodes", place, node.name)
    write_new(server / "nodes" / f"{node.name}.toml", tomli_w.dumps(deployment.bounds()).encode())
    write_new(place / "ca.crt", (server / "ca.crt").read_bytes())
    _write_node(deployment, node, place)


def compose_file(deployment: Deployment) -> bytes:
    """Return the content of compose.yaml, which starts the server and every node."""
    return render(
        TEMPLATES / f"{COMPOSE}.j2",
        bind=deployment.bind,
        names=[node.name for node in deployment.nodes],
        port=deployment.port,
        **_container_user(),
    )


def _container_user() -> dict[str, int]:
    return {"uid": os.getuid() or CONTAINER_UID, "gid": os.getgid() or CONTAINER_UID}


def write_facts(deployment: Deployment, folder: Path) -> None:
    """Write all but the experiment, which the app holds."""
    facts = asdict(replace(deployment, experiment=Experiment()))
    del facts["experiment"]
    folder.mkdir(mode=0o700, exist_ok=True)
    atomic_write(folder / FACTS, tomli_w.dumps(facts).encode(), shared=True)


def write_key(keys: Path, place: Path, name: str) -> None:
    """Make a node's key pair: its own half in its folder, the other among the server's keys."""
    private, public = make_node_key()
    write_new(keys / f"{name}.pub", public)
    write_new(place / "node.key", private)


def _write_server(deployment: Deployment, folder: Path) -> None:
    superlink = render(
        TEMPLATES / "superlink.sh.j2",
        bind=deployment.bind,
        port=deployment.port,
        own_port=deployment.own_port,
        reply_mib=deployment.reply_mib,
    )
    write_new(folder / "superlink.sh", superlink, mode=0o700)
    for name in ("register.sh", "run.sh"):
        script = render(TEMPLATES / f"{name}.j2", address=deployment.own_address)
        write_new(folder / name, script, mode=0o700)
    _write_unit(deployment, folder, "superlink", "server", "the server (Flower SuperLink, relay)")
    write_app(folder / "app", deployment.server_experiment())


def _write_node(deployment: Deployment, node: NodeSpec, folder: Path) -> None:
    write_new(folder / "node.toml", tomli_w.dumps(deployment.node_config(node)).encode())
    supernode = render(
        TEMPLATES / "supernode.sh.j2",
        server=deployment.address,
        port=node.port,
        stays=deployment.isolation == "process",
        script=deployment.script,
    )
    write_new(folder / "supernode.sh", supernode, mode=0o700)
    what = f"the node {node.name} (Flower SuperNode)"
    _write_unit(deployment, folder, "supernode", f"nodes/{node.name}", what)


def _write_unit(
    deployment: Deployment, folder: Path, program: str, place: str, description: str
) -> None:
    """Write the systemd unit that starts a program's script where its folder is installed."""
    file = f"fedpet-{program}.service"
    unit = render(
        TEMPLATES / "systemd.service.j2",
        file=file,
        folder=f"{deployment.install}/{place}",
        venv=f"{deployment.install}/venv",
        script=f"{program}.sh",
        description=f"fedpet: {description}",
    )
    write_new(folder / file, unit)


def write_new(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Write a new file for its owner alone, in a folder that is; never readable for a moment."""
    for folder in reversed([path.parent, *path.parent.parents]):
        if not folder.exists():
            folder.mkdir(mode=0o700)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(handle, "wb") as file:
        file.write(content)


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _whole(name: str) -> str:
    """Return a path that is there in full: scripts start in folders of their own."""
    return str(absolute(name)) if name and expand(name).exists() else name
