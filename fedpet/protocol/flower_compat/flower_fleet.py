"""List a SuperLink's nodes, let them in and turn them out, and bound what is pulled from them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fedpet.protocol.flower_compat.flower_messages import CHUNK_BYTES

__all__ = ["FlowerNodes", "bound_replies", "flower_nodes"]


class FlowerNodes:
    """List, register and turn out a SuperLink's nodes: its command line shows no names."""

    def __init__(self, control: Any) -> None:
        self._control = control

    def listed(self) -> dict[bytes, Any]:
        """Return Flower's books of each node, by public key, without those that were turned out."""
        from flwr.proto.control_pb2 import ListNodesRequest

        nodes = self._control.ListNodes(ListNodesRequest()).nodes_info
        return {node.public_key: node for node in nodes if node.status != "unregistered"}

    def register(self, key: bytes, name: str) -> None:
        """Let a node in."""
        from flwr.proto.control_pb2 import RegisterNodeRequest

        self._control.RegisterNode(RegisterNodeRequest(public_key=key, name=name))

    def turn_out(self, node_id: int) -> None:
        """Let a node in no more."""
        from flwr.proto.control_pb2 import UnregisterNodeRequest

        self._control.UnregisterNode(UnregisterNodeRequest(node_id=node_id))


@contextmanager
def flower_nodes(connection: str) -> Iterator[FlowerNodes]:
    """Connect to the SuperLink of a connection that `$FLWR_HOME/config.toml` names."""
    from flwr.cli.flower_config import read_superlink_connection
    from flwr.cli.utils import init_http_client_from_connection

    control = init_http_client_from_connection(read_superlink_connection(connection))
    try:
        yield FlowerNodes(control)
    finally:
        control.close()


def bound_replies(grid: Any, most_bytes: int) -> None:
    """Let a deployment's Grid pull no reply of more bytes; it becomes an error in its place.

    Flower pulls every object of a reply before anything of it can be seen, and says beforehand only
    how many there are: a reply of more than its bytes can fill is not pulled at all.
    """
    from flwr.superlink.grid.http_grid import HttpGrid

    if isinstance(grid, HttpGrid):
        client: Any = grid._runtime_client
        if not isinstance(client, _BoundedClient):
            client = vars(grid)["_client"] = _BoundedClient(client)
        client.most_bytes = most_bytes


class _BoundedClient:
    """Stand before Flower's client of the Runtime API, and bound what it pulls."""

    most_bytes = 0

    def __init__(self, client: Any) -> None:
        self._client = client
        self._root: dict[str, str] = {}  # object -> root of the reply that is being pulled
        self._pulled: dict[str, int] = {}  # root -> bytes so far

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def PullMessages(self, request: Any) -> Any:
        """Pull what replies are made of, and forget the objects of those that have too many."""
        response = self._client.PullMessages(request)
        self._root, self._pulled = {}, {}
        for tree in response.message_object_trees:
            objects = _object_ids(tree)
            most = self.most_bytes // CHUNK_BYTES + 8
            if len(objects) > most:
                tree.ClearField("children")
                self._pulled[tree.object_id] = self.most_bytes + 1
                objects = [tree.object_id]
            self._root.update(dict.fromkeys(objects, tree.object_id))
        return response

    def PullObject(self, request: Any) -> Any:
        """Pull an object; what is beyond the reply's bound is not found."""
        from flwr.proto.message_pb2 import PullObjectResponse

        root = self._root.get(request.object_id, "")
        if self._pulled.get(root, 0) > self.most_bytes:
            return PullObjectResponse(object_found=False)
        response = self._client.PullObject(request)
        self._pulled[root] = self._pulled.get(root, 0) + len(response.object_content)
        return response


def _object_ids(tree: Any) -> list[str]:
    found, waiting = [], [tree]
    while waiting:
        one = waiting.pop()
        found.append(one.object_id)
        waiting.extend(one.children)
    return found
