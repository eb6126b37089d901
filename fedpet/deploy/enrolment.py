"""Bring SuperLink's list of nodes in line with the folder of allowed nodes.

A key of the folder that SuperLink does not know is registered, and a node whose key is not in the
folder any more is turned out. Where a node's key was replaced, both happen: it comes back under the
same name, with another of Flower's numbers.

A SuperLink that is still starting is waited for.

    python -m fedpet.deploy.enrolment nodes
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import httpx

from fedpet.errors import ConfigError
from fedpet.protocol.flower_compat.flower_fleet import FlowerNodes, flower_nodes
from fedpet.server.allowed_nodes import AllowedNodes

__all__ = ["enrol", "enrol_when_up"]

CONNECTION = "fedpet"  # of `flwr/config.toml`, which the server's scripts write
WAIT_SECONDS, PAUSE_SECONDS = 60.0, 1.0  # for a SuperLink that is starting


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


def enrol_when_up(allowed: AllowedNodes, wait_seconds: float = WAIT_SECONDS) -> list[str]:
    """Register and turn out nodes, as soon as SuperLink listens.

    Args:
        allowed: Those that may be there.
        wait_seconds: For how long to try to connect.

    Returns:
        A sentence a node.

    Raises:
        httpx.HTTPError: SuperLink does not answer.
    """
    with flower_nodes(CONNECTION) as flower:
        limit, told = time.monotonic() + wait_seconds, False
        while True:
            try:
                return enrol(flower, allowed)
            except httpx.ConnectError:
                if time.monotonic() > limit:
                    raise
                if not told:
                    print(f"Waiting for SuperLink, {wait_seconds:.0f} s at most.", flush=True)
                    told = True
                time.sleep(PAUSE_SECONDS)


def main() -> None:
    """Enrol the nodes of a folder."""
    parser = argparse.ArgumentParser(prog="fedpet.deploy.enrolment")
    parser.add_argument("folder", type=Path)
    try:
        allowed = AllowedNodes(parser.parse_args().folder)
        print("\n".join(enrol_when_up(allowed)))
    except ConfigError as error:
        sys.exit(f"Error: {error}")
    except httpx.HTTPError as error:
        sys.exit(f"Error: SuperLink does not answer ({error}): start the server first.")


if __name__ == "__main__":
    main()
