"""Change who takes part in a deployment: add a node, take one out, replace keys and certificates.

Everything is done in the deployment's folder, where the authority's key is. What has to be copied
afterwards, and to which machine, is returned in words; the server learns of nodes from its folder
`nodes/` at once, and SuperLink by `register.sh`.
"""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

from fedpet.config import Experiment
from fedpet.deploy.certificates import authority_ends, make_authority, make_server_certificate
from fedpet.deploy.deployment import (
    COMPOSE,
    FACTS,
    NODE_FILES,
    Deployment,
    NodeSpec,
    add_node_files,
    compose_file,
    with_ports,
    write_facts,
    write_key,
    write_new,
)
from fedpet.errors import ConfigError

__all__ = [
    "add_node",
    "read_deployment",
    "remove_node",
    "renew_authority",
    "renew_certificate",
    "rotate_key",
]

REGISTER = "then run `register.sh` there"


def read_deployment(folder: Path) -> Deployment:
    """Read the deployment that a folder was made of.

    Raises:
        ConfigError: The folder holds none.
    """
    try:
        facts = tomllib.loads((folder / FACTS).read_text(encoding="utf-8"))
        project = tomllib.loads((folder / "server" / "app" / "pyproject.toml").read_text("utf-8"))
        config = project["tool"]["flwr"]["app"]["config"]
        nodes = tuple(NodeSpec(**node) for node in facts.pop("nodes"))
        made = Deployment(experiment=Experiment.from_run_config(config), nodes=nodes, **facts)
        return with_ports(made)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{str(folder)!r} is no deployment's folder as `fedpet deploy` makes it: {error}."
        ) from None


def add_node(folder: Path, node: NodeSpec) -> str:
    """Make a node's folder and key.

    Raises:
        ConfigError: There is a node of this name.
    """
    deployment = read_deployment(folder)
    changed = replace(deployment, nodes=(*deployment.nodes, node))  # refuses a name that is there
    changed = with_ports(changed)
    add_node_files(changed, folder, changed.nodes[-1])
    write_facts(changed, folder)
    return (
        f"{node.name}: copy nodes/{node.name}/ to its device, and server/nodes/ to the server; "
        f"{REGISTER}.{_compose_follows(deployment, changed, folder)}"
    )


def remove_node(folder: Path, name: str) -> str:
    """Take a node out, with its key; rows and whatever else lies in its folder stay.

    Raises:
        ConfigError: There is no node of this name, or no other.
    """
    deployment = _with(folder, name)
    left = tuple(node for node in deployment.nodes if node.name != name)
    changed = replace(deployment, nodes=left)
    write_facts(changed, folder)
    for suffix in ("pub", "toml"):
        (folder / "server" / "nodes" / f"{name}.{suffix}").unlink(missing_ok=True)
    return (
        f"{name}: remove nodes/{name}.pub and nodes/{name}.toml from the server; {REGISTER}."
        f"{_remove_node_files(folder, name)}{_compose_follows(deployment, changed, folder)}"
    )


def rotate_key(folder: Path, name: str) -> str:
    """Replace a node's key.

    Raises:
        ConfigError: There is no node of this name.
    """
    _with(folder, name)
    place, keys = folder / "nodes" / name, folder / "server" / "nodes"
    (place / "node.key").unlink(missing_ok=True)
    (keys / f"{name}.pub").unlink(missing_ok=True)
    write_key(keys, place, name)
    return (
        f"{name}: copy nodes/{name}/node.key to its device, and server/nodes/{name}.pub to the "
        f"server; {REGISTER} and restart the node."
    )


def renew_certificate(folder: Path) -> str:
    """Make the server a new certificate and key, by the same authority: nodes need nothing.

    Raises:
        ConfigError: The authority itself ends before the certificate would.
    """
    deployment = read_deployment(folder)
    authority, key = _authority(folder)
    if authority_ends(authority, days=deployment.days):
        raise ConfigError(
            f"the authority ends within {deployment.days} days: replace it first, with "
            "--renew-authority, and copy its certificate to every node."
        )
    certificate, server_key = make_server_certificate(
        deployment.server_names, authority, key, days=deployment.days
    )
    _replace(folder / "server" / "server.key", server_key)
    _replace(folder / "server" / "server.pem", certificate)
    return "copy server/server.key and server/server.pem to the server, and restart it."


def renew_authority(folder: Path) -> str:
    """Make a new authority beside the old one, which nodes trust until the certificate follows."""
    deployment = read_deployment(folder)
    old, _ = _authority(folder)
    authority, key = make_authority(deployment.host, days=deployment.authority_days)
    _replace(folder / "authority" / "ca.key", key)
    _replace(folder / "authority" / "ca.crt", authority)
    for place in ("server", *(f"nodes/{node.name}" for node in deployment.nodes)):
        _replace(folder / place / "ca.crt", authority + old)
    return (
        "copy ca.crt of each node's folder to its device and of server/ to the server, and restart "
        "them. When all have it, --renew-certificate signs by the new authority."
    )


def _remove_node_files(folder: Path, name: str) -> str:
    """Remove what the deployment wrote into a node's folder; return a sentence if more is there."""
    place = folder / "nodes" / name
    for file in NODE_FILES:
        (place / file).unlink(missing_ok=True)
    if not place.exists():
        return ""
    if any(place.iterdir()):
        return f" What else lies in {place} stays: delete it if it is not needed."
    place.rmdir()
    return ""


def _compose_follows(before: Deployment, after: Deployment, folder: Path) -> str:
    """Write compose.yaml anew; return a sentence if it was edited by hand, and so stays."""
    path = folder / COMPOSE
    if path.exists() and path.read_bytes() == compose_file(before):
        _replace(path, compose_file(after))
        return ""
    return f" {COMPOSE} is not as the deployment wrote it: change its nodes by hand."


def _with(folder: Path, name: str) -> Deployment:
    deployment = read_deployment(folder)
    names = [node.name for node in deployment.nodes]
    if name not in names:
        raise ConfigError(f"there is no node {name!r}. There are {', '.join(map(repr, names))}.")
    return deployment


def _authority(folder: Path) -> tuple[bytes, bytes]:
    try:
        place = folder / "authority"
        return (place / "ca.crt").read_bytes(), (place / "ca.key").read_bytes()
    except OSError as error:
        raise ConfigError(f"the authority's key is not here: {error}.") from None


def _replace(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    write_new(path, content)
