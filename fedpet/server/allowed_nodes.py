"""Read who may take part in a deployment: a key for each node, and what it may bring.

    FOLDER/NAME.pub     the node's public key, in OpenSSH's format
           NAME.toml    its bounds, where they are not the defaults:

    clients = 1         most clients that it brings
    names = ["ward-1"]  their names; [] is its own, or any but another's where it brings many
    rows = 5000         most rows of each client

Flower proves that a node has its private key. The folder says which name that key stands for, so
that no node can speak in the name of another. It is read anew when it changes: a node that is added
may come at once, and one whose key is taken out is gone from the next round on.
"""

from __future__ import annotations

import math
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_public_key,
)

from fedpet.errors import ConfigError

__all__ = ["AllowedNode", "AllowedNodes"]

MAX_ROWS = 2**32 - 1  # what a registration can say


@dataclass(frozen=True)
class AllowedNode:
    """Bound what one node may bring.

    Attributes:
        name: Of the node, by which logs and tables call it.
        clients: Most clients that it brings.
        names: Their names; () is the node's own where it brings one, else any but another's.
        rows: Most rows of each client.
    """

    name: str
    clients: int = 1
    names: tuple[str, ...] = ()
    rows: int = MAX_ROWS

    @property
    def own_names(self) -> tuple[str, ...]:
        """Names that nobody else may bring."""
        return self.names or (self.name,)


class AllowedNodes:
    """Know the nodes of a folder, by their public keys.

    Args:
        folder: Of `NAME.pub` and `NAME.toml`.

    Raises:
        ConfigError: A file does not read, or two nodes have one key or one name of a client.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._state: object = None
        self._looked_at = -math.inf
        self._by_key: dict[bytes, AllowedNode] = {}
        self.refresh()

    def refresh(self, max_age: float = 0.0) -> None:
        """Read the folder anew where a file of it has changed.

        Args:
            max_age: Seconds for which the last look at the folder is good enough.
        """
        if time.monotonic() < self._looked_at + max_age:
            return
        self._looked_at = time.monotonic()
        files = sorted(self.folder.glob("*.pub")) + sorted(self.folder.glob("*.toml"))
        try:
            state = [(path.name, (s := path.stat()).st_mtime_ns, s.st_size) for path in files]
        except FileNotFoundError:  # it was taken out just now
            return
        if state == self._state:
            return
        if not self.folder.is_dir():
            raise ConfigError(f"there is no folder {str(self.folder)!r} with the nodes' keys.")
        self._by_key = _read(self.folder)
        self._state = state

    def of_key(self, key: bytes) -> AllowedNode | None:
        """Return the node of a public key, in PEM as Flower has it; None of an unknown one."""
        return self._by_key.get(key)

    def items(self) -> list[tuple[bytes, AllowedNode]]:
        """Return keys and nodes, in the order of the names."""
        return sorted(self._by_key.items(), key=lambda item: item[1].name)

    def refuse(self, node: AllowedNode, num_rows: Mapping[str, int]) -> dict[str, str]:
        """Return the clients that a node may not bring, each with the reason.

        Args:
            node: Of the key that the registration came with.
            num_rows: Client -> its rows, as the node says.
        """
        if len(num_rows) > node.clients:
            reason = (
                f"node {node.name!r} brings {len(num_rows)} clients and may bring {node.clients}: "
                f"raise `clients` in {self._file(node)}."
            )
            return dict.fromkeys(num_rows, reason)
        owner = {name: other.name for _, other in self.items() for name in other.own_names}
        refused = {}
        for client, rows in num_rows.items():
            if owner.get(client, node.name) != node.name:
                refused[client] = f"node {node.name!r} brings the name of {owner[client]!r}."
            elif (node.names or node.clients == 1) and client not in node.own_names:
                known = ", ".join(map(repr, node.own_names))
                refused[client] = (
                    f"node {node.name!r} may bring {known}: name it in {self._file(node)}."
                )
            elif rows > node.rows:
                refused[client] = (
                    f"node {node.name!r} says that it holds {rows} rows, and may hold {node.rows}: "
                    f"raise `rows` in {self._file(node)}."
                )
        return refused

    def _file(self, node: AllowedNode) -> str:
        return str(self.folder / f"{node.name}.toml")


def _read(folder: Path) -> dict[bytes, AllowedNode]:
    nodes: dict[bytes, AllowedNode] = {}
    owners: dict[str, str] = {}
    for path in sorted(folder.glob("*.pub")):
        try:
            key = load_ssh_public_key(path.read_bytes()).public_bytes(
                Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
            )
        except (ValueError, UnsupportedAlgorithm, OSError) as error:
            raise ConfigError(
                f"{str(path)!r} is no public key in OpenSSH's format: {error}."
            ) from None
        node = _bounds(path.with_suffix(".toml"), path.stem)
        if key in nodes:
            raise ConfigError(f"nodes {nodes[key].name!r} and {node.name!r} have one key.")
        for name in node.own_names:
            if owners.setdefault(name, node.name) != node.name:
                raise ConfigError(f"nodes {owners[name]!r} and {node.name!r} share {name!r}.")
        nodes[key] = node
    return nodes


def _bounds(path: Path, name: str) -> AllowedNode:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(path)!r} does not read: {error}.") from None
    for key, value in table.items():
        fits = key in ("clients", "rows") and type(value) is int and 1 <= value <= MAX_ROWS
        fits = fits or (
            key == "names" and isinstance(value, list) and all(isinstance(v, str) for v in value)
        )
        if not fits:
            raise ConfigError(
                f"{str(path)!r} has {key} = {value!r}: it holds clients and rows, whole numbers "
                f"from 1 to {MAX_ROWS}, and names, a list of strings."
            )
    names = tuple(table.get("names", ()))
    return AllowedNode(
        name, clients=table.get("clients", len(names) or 1), names=names,
        rows=table.get("rows", MAX_ROWS),
    )  # fmt: skip
