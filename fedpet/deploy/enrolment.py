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

import httpx

from fedpet.errors import ConfigError
from fedpet.protocol.flower_compat import FlowerNodes, flower_nodes
from fedpet.server.allowed_nodes import AllowedNodes

__all__ = ["enrol"]

CONNECTION = "fedpet"  # of `flwr/config.toml`, which the server's scripts write


def enrol(flower: FlowerNodes, allowed: AllowedNodes) -> list[str]:
    """Register and turn out nodes.

    Args:
        flower: SuperLink's nodes.
        allowed: Those that may be there.

    Returns:
        A sentence a node.
    """
    there, said = flower.listed(), []
    for key, node in there.items():
        if allowed.of_key(key) is None:
            flower.turn_out(node.node_id)
            said.append(f"{node.name or node.node_id}: turned out, its key is not in the folder")
    for key, one in allowed.items():
        if key not in there:
            flower.register(key, one.name)
        said.append(f"{one.name}: {there[key].status if key in there else 'let in'}")
    return said


def main() -> None:
    """Enrol the nodes of a folder."""
    parser = argparse.ArgumentParser(prog="fedpet.deploy.enrolment")
    parser.add_argument("folder", type=Path)
    try:
        allowed = AllowedNodes(parser.parse_args().folder)
        with flower_nodes(CONNECTION) as flower:
            print("\n".join(enrol(flower, allowed)))
    except ConfigError as error:
        sys.exit(f"Error: {error}")
    except httpx.HTTPError as error:
        sys.exit(f"Error: SuperLink does not answer ({error}): start the server first.")


if __name__ == "__main__":
    main()
