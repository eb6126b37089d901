"""Bring SuperLink's list of nodes in line with the folder of allowed nodes.

A key of the folder that SuperLink does not know is registered, and a node whose key is not in the
folder any more is turned out. Where a node's key was replaced, both happen: it comes back under the
same name, with another of Flower's numbers.

    python -m fedpet.deploy.enrolment nodes
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from fedpet.errors import ConfigError
from fedpet.server.allowed_nodes import AllowedNodes

__all__ = ["enrol", "listed_nodes"]

CONNECTION = "fedpet"  # of `flwr/config.toml`, which the server's scripts write


def listed_nodes(control: Any) -> dict[bytes, Any]:
    """Return SuperLink's nodes by public key, those left out that were turned out."""
    from flwr.proto.control_pb2 import ListNodesRequest

    nodes = control.ListNodes(ListNodesRequest()).nodes_info
    return {node.public_key: node for node in nodes if node.status != "unregistered"}


def enrol(control: Any, allowed: AllowedNodes) -> list[str]:
    """Register and turn out nodes.

    Args:
        control: Client of SuperLink's Control API.
        allowed: Those that may be there.

    Returns:
        A sentence a node.
    """
    from flwr.proto.control_pb2 import RegisterNodeRequest, UnregisterNodeRequest

    there, said = listed_nodes(control), []
    for key, node in there.items():
        if allowed.of_key(key) is None:
            control.UnregisterNode(UnregisterNodeRequest(node_id=node.node_id))
            said.append(f"{node.name or node.node_id}: turned out, its key is not in the folder")
    for key, allowed_node in allowed.items():
        if key not in there:
            control.RegisterNode(RegisterNodeRequest(public_key=key, name=allowed_node.name))
            said.append(f"{allowed_node.name}: let in")
        else:
            said.append(f"{allowed_node.name}: {there[key].status}")
    return said


def main() -> None:
    """Enrol the nodes of a folder."""
    import httpx
    from flwr.cli.flower_config import read_superlink_connection
    from flwr.cli.utils import init_http_client_from_connection

    parser = argparse.ArgumentParser(prog="fedpet.deploy.enrolment")
    parser.add_argument("folder", type=Path)
    try:
        allowed = AllowedNodes(parser.parse_args().folder)
        control = init_http_client_from_connection(read_superlink_connection(CONNECTION))
        try:
            print("\n".join(enrol(control, allowed)))
        finally:
            control.close()
    except ConfigError as error:
        sys.exit(f"Error: {error}")
    except httpx.HTTPError as error:
        sys.exit(f"Error: SuperLink does not answer ({error}): start the server first.")


if __name__ == "__main__":
    main()
