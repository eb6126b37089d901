"""Touch the private parts of Flower and Ray, each with the reason; no other file does.

Written for flwr 1.41 and 1.42, which `constraints.txt` pins; the tests of each caller fail where a
later version has moved a part.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from queue import Empty, Queue
from threading import Event
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import Context, Error, Message, Metadata, RecordDict
from flwr.app.message import arrayrecord, make_message
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE as CHUNK_BYTES
from flwr.common.constant import ErrorCode, SubStatus
from flwr.supercore.inflatable.inflatable_object import InflatableObject
from flwr.supercore.task_identity import TaskIdentity

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Strategy

__all__ = [
    "CHUNK_BYTES",
    "RESTARTS",
    "FlowerNodes",
    "InflatableObject",
    "MessageEvents",
    "RuntimeTask",
    "RuntimeTasks",
    "become_local_task",
    "bound_replies",
    "client_app_raised",
    "flower_nodes",
    "is_actor_alive",
    "load_optimizer_state",
    "make_message",
    "make_reply",
    "mixed_into_pool",
    "optimizer_state",
    "prompt_messages",
    "quiet_flower",
    "ray_on_loopback",
    "raylet_of",
    "run_supernode",
    "set_message_id",
    "set_sender",
    "without_collections",
]

# CHUNK_BYTES: Flower splits arrays at this size, and each chunk has a header of its own to count.
# InflatableObject: the tree of parts that a message is sent as, whose bytes the ledger counts.

# Flower's pool of workers never replaces one: a worker that was killed, for memory say, takes every
# later message of its node with it. Ray replaces it and repeats the message where these options of
# its actors say so, and Flower hands its client_resources on as those. What comes out is the same,
# since a message holds all that decides its reply (law 6).
RESTARTS = {
    "max_restarts": -1,
    "max_task_retries": 3,  # of a message that kills its worker each time; then it is refused
}


LOOK_SECONDS = 0.1  # between looks for messages where no event came


def client_app_raised(error: Error) -> bool:
    """Tell if a node's ClientApp raised, and not that no reply came of it."""
    return bool(error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION)


def make_reply(
    content: RecordDict | Error, *, node: int, kind: str = "train", asked: str = "asked"
) -> Message:
    """Make a message as a node's, which Flower lets only a node's own process do.

    Args:
        content: Its records, or what went wrong.
        node: Id of the node that counts as its sender.
        kind: Message type.
        asked: Id of the message that it answers.
    """
    metadata = Metadata(
        run_id=0,
        message_id="",
        src_node_id=node,
        dst_node_id=0,
        reply_to_message_id=asked,
        group_id="",
        created_at=time.time(),
        ttl=1.0,
        message_type=kind,
    )
    if isinstance(content, Error):
        return make_message(metadata=metadata, error=content)
    return make_message(metadata=metadata, content=content)


def set_sender(message: Message, node: int, kind: str) -> None:
    """Write the sender that the server knows over the one that the node wrote (law 7)."""
    message.metadata.__dict__["_src_node_id"] = node
    message.metadata.__dict__["_message_type"] = kind


def set_message_id(message: Message, number: str) -> None:
    """Number a message, as a SuperLink does, where none is there."""
    message.metadata.__dict__["_message_id"] = number


def become_local_task() -> None:
    """Take the ids of a task, without which Flower makes no message outside of its processes."""
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1


def optimizer_state(strategy: Strategy) -> dict[str, np.ndarray]:
    """Return the vectors of a server optimiser by Flower's names, without those not made yet.

    Flower has no way to save them. A strategy that has `state()` and `load_state()` of its own is
    asked instead.
    """
    if hasattr(strategy, "state"):
        return dict(strategy.state())
    return {
        name: next(iter(held.values())) if isinstance(held, dict) else held[0]
        for name in _vectors(strategy)
        if (held := getattr(strategy, name))
    }


def load_optimizer_state(
    strategy: Strategy, state: Mapping[str, np.ndarray], array_name: str
) -> None:
    """Go back to an `optimizer_state`; to the beginning where a vector is not in it."""
    if hasattr(strategy, "load_state"):
        strategy.load_state(state)
        return
    for name, kind in _vectors(strategy).items():
        vector = state.get(name)
        held: Any = None
        if vector is not None:
            held = {array_name: vector} if kind is dict else [vector]
        setattr(strategy, name, held)
    # Flower's optimisers hold the global values too, and take them from the next round's.
    vars(strategy)["current_arrays"] = None


def _vectors(strategy: Strategy) -> dict[str, type]:
    """Return Flower's attributes that hold vectors: in a dict by array, or in a list."""
    from flwr.serverapp.strategy import FedAvgM  # devices go without: they never aggregate
    from flwr.serverapp.strategy.fedopt import FedOpt

    if isinstance(strategy, FedOpt):
        return {"m_t": dict, "v_t": dict}
    return {"momentum_vector": list} if isinstance(strategy, FedAvgM) else {}


@contextmanager
def quiet_flower() -> Iterator[None]:
    """Keep Flower's log to errors: fedpet prints progress and refusals itself."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning, module="flwr")
            yield
        logger.setLevel(level)
    except Exception:
        logger.setLevel(level)
        raise  # an interrupt keeps it off for longer, see `stoppable`


@contextmanager
def without_collections() -> Iterator[None]:
    """Leave out the garbage collections that Flower asks for, with some rules one a reply.

    Each goes through the round's messages, of which there is one a client.
    """
    with _replaced(arrayrecord, gc=SimpleNamespace(collect=lambda: 0)):
        yield


@contextmanager
def mixed_into_pool(mixin: type, workers: int) -> Iterator[None]:
    """Put a class in front of Flower's pool of workers, and wait for all workers at once.

    Flower waits for at most 32 of them, and for fewer on a machine of few cores.
    """
    from concurrent.futures import ThreadPoolExecutor
    from functools import partial

    from flwr.server.superlink.fleet.vce import vce_api
    from flwr.server.superlink.fleet.vce.backend import raybackend
    from flwr.simulation.ray_transport.ray_actor import BasicActorPool

    pool = type(mixin.__name__, (mixin, BasicActorPool), {})
    with (
        _replaced(raybackend, BasicActorPool=partial(pool, workers=workers)),
        _replaced(vce_api, ThreadPoolExecutor=partial(ThreadPoolExecutor, max_workers=workers)),
    ):
        yield


@dataclass(frozen=True)
class MessageEvents:
    """Events of a simulation's messages.

    Attributes:
        sent: The server has sent one.
        arrived: A reply lies ready for it.
    """

    sent: Event = field(default_factory=Event)
    arrived: Event = field(default_factory=Event)


@contextmanager
def prompt_messages(events: MessageEvents) -> Iterator[None]:
    """Let a simulation hand messages on when they come.

    Flower's own loops are these, and look for messages to nodes ten times a second.
    """
    from flwr.server.superlink.fleet.vce import vce_api

    def to_nodes(state: Any, queue: Queue[Message], nodes: Iterable[int], stopped: Event) -> None:
        while not stopped.is_set():
            events.sent.clear()
            found = True
            while found:  # one a node in turn
                found = False
                for node in nodes:
                    for message in state.get_message_ins(node_id=node, limit=1):
                        queue.put(message)
                        found = True
            events.sent.wait(LOOK_SECONDS)

    def to_server(state: Any, queue: Queue[Message], stopped: Event) -> None:
        while not stopped.is_set():
            with suppress(Empty):
                state.store_message_res(queue.get(timeout=1.0))
                events.arrived.set()

    with _replaced(vce_api, add_messages_to_queue=to_nodes, put_message_into_state=to_server):
        yield


@contextmanager
def _replaced(module: Any, **ours: Any) -> Iterator[None]:
    """Put values in the place of a module's own."""
    before = {name: vars(module)[name] for name in ours}
    vars(module).update(ours)
    try:
        yield
    finally:
        vars(module).update(before)


def is_actor_alive(actor: Any) -> bool:
    """Tell from Ray's books whether a worker runs: its public way needs the dashboard."""
    return _actor_books(actor).get("State") == "ALIVE"


def raylet_of(actor: Any) -> tuple[str, int] | None:
    """Return host and port of the raylet on a worker's machine; None where it has none yet."""
    import ray

    machine = _actor_books(actor).get("Address", {}).get("NodeID")
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        if node["NodeID"] == machine:
            return node["NodeManagerAddress"], node["NodeManagerPort"]
    return None


def _actor_books(actor: Any) -> Mapping[str, Any]:
    from ray._private.state import actors

    books: Mapping[str, Any] = actors(actor._actor_id.hex())
    return books


@contextmanager
def ray_on_loopback() -> Iterator[None]:
    """Let a Ray that is started inside listen on 127.0.0.1 alone.

    It does so by itself where it is made for no cluster, as on macOS, and replaces that address by
    the machine's own elsewhere, even one that it is given.
    """
    from ray._private import ray_constants

    name, before = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    inherited = os.environ.get(name)
    os.environ[name] = "0"  # of the processes that it starts
    vars(ray_constants)["ENABLE_RAY_CLUSTER"] = False
    try:
        yield
    finally:
        vars(ray_constants)["ENABLE_RAY_CLUSTER"] = before
        os.environ.pop(name)
        if inherited is not None:
            os.environ[name] = inherited


# -- a deployment -------------------------------------------------------------------------------


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


# -- a node's own processes ------------------------------------------------------------------


def run_supernode(
    arguments: Sequence[str],
    secret: bytes,
    *,
    pause: Callable[[bool], float],
    heartbeat: Callable[[float], int],
) -> None:
    """Run Flower's SuperNode in this process; it ends with it.

    Args:
        arguments: To `flower-supernode`.
        secret: Shared with the worker; with no secret anybody on the machine could answer.
        pause: Gives the seconds until the server is asked again, told if a message has just come.
            Flower waits for three, by a call that is not to be set.
        heartbeat: Gives the seconds between signs of life, told that pause; Flower's are a
            constant.
    """
    from functools import partial

    import httpx
    from flwr.supercore import heartbeat as heartbeats
    from flwr.supercore.protobuf import client as protobuf_client
    from flwr.supernode import fleet_http_connection, start_client_internal
    from flwr.supernode.cli.flower_supernode import flower_supernode

    reading, writing = os.pipe()  # Flower takes the secret from a file; this one is on no disk
    os.write(writing, secret)
    os.close(writing)
    came = False

    def sleep(seconds: float) -> None:
        nonlocal came
        is_idle = seconds == _IDLE_SECONDS
        if is_idle:
            seconds = pause(came)
            for module in (heartbeats, fleet_http_connection):
                vars(module)["HEARTBEAT_DEFAULT_INTERVAL"] = heartbeat(seconds)
        came = not is_idle  # Flower's shorter waits are for the answer to a message
        time.sleep(seconds)

    vars(start_client_internal)["time"] = SimpleNamespace(sleep=sleep)
    # A connection that is made anew costs three times what a question does. It lasts for as long
    # as the server keeps it too.
    limits = httpx.Limits(keepalive_expiry=_KEEPALIVE_SECONDS)
    kept = {**vars(httpx), "Client": partial(httpx.Client, limits=limits)}
    vars(protobuf_client)["httpx"] = SimpleNamespace(**kept)
    sys.argv = [
        "flower-supernode",
        *("--isolation", "process", "--superexec-auth-secret-file", f"/dev/fd/{reading}"),
        *arguments,
    ]
    flower_supernode()


_KEEPALIVE_SECONDS = 600.0
_IDLE_SECONDS = 3  # the sleep of Flower's loop after an empty pull


class RuntimeTask:
    """Hold one message that a SuperNode gives to this process, and send its answer.

    Attributes:
        message: The server's.
        context: The run's and the node's config.
        bundle: The server's app, a ZIP archive.

    Raises:
        httpx.HTTPError: The SuperNode is not reached any more.
    """

    def __init__(self, client: Any) -> None:
        from flwr.supercore.heartbeat import HeartbeatSender
        from flwr.supernode.runtime.run_clientapp import pull_task_input

        self._client = client
        # Without them the SuperNode takes the worker for dead, and answers with an error.
        self._heartbeat = HeartbeatSender(self._is_alive)
        self._heartbeat.start()
        try:
            self.message, self.context, _, fab = pull_task_input(client)
            self.bundle = fab.content
        except BaseException:
            self.close()
            raise

    def _is_alive(self) -> bool:
        import httpx
        from flwr.proto.runtime_pb2 import SendTaskHeartbeatRequest

        try:
            self._client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
        except httpx.HTTPError:
            return False  # it is tried again
        return True  # a task that the SuperNode has given up: its answer will be refused

    def answer(self, reply: Message) -> None:
        """Send the answer."""
        self._finish(reply, "")

    def fail(self, reason: str) -> None:
        """Send an error in the place of an answer."""
        error = Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=reason)
        self._finish(Message(error, reply_to=self.message), reason)

    def _finish(self, reply: Message, details: str) -> None:
        from flwr.supernode.runtime.run_clientapp import push_message, push_task_output

        push_message(self._client, reply, self.context)
        status = SubStatus.FAILED if details else SubStatus.COMPLETED
        context: Context = self.context
        push_task_output(client=self._client, context=context, sub_status=status, details=details)

    def close(self) -> None:
        """End the heartbeats and the connection."""
        if self._heartbeat.is_running:
            self._heartbeat.stop()
        self._client.close()


class RuntimeTasks:
    """Acquire a SuperNode's messages one by one, as Flower's SuperExec does for a new process each.

    Args:
        address: "host:port" of the SuperNode's Runtime API, on this machine.
        secret: The one that the SuperNode was started with.
    """

    def __init__(self, address: str, secret: bytes) -> None:
        from flwr.supercore.interceptors import SuperExecAuthHttpInterceptor

        self._address = address
        methods = ("/flwr.proto.Runtime/AcquireTask",)
        signed = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=methods)
        self._client = self._connect("SuperExec", signed)

    def _connect(self, component: str, interceptor: Any) -> Any:
        from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
        from flwr.supercore.retry import make_simple_http_retry_invoker
        from flwr.supercore.runtime import RuntimeHttpClient

        version = RuntimeVersionHttpInterceptor(component_name=component)
        return RuntimeHttpClient.from_server_address(
            server_address=self._address,
            insecure=True,  # of the loopback
            root_certificates=None,
            interceptors=[version, interceptor],
            retry_invoker=make_simple_http_retry_invoker(),
        )

    def close(self) -> None:
        """End the connection."""
        self._client.close()

    def acquire(self) -> RuntimeTask | None:
        """Return the next message; None where none waits.

        Raises:
            httpx.HTTPError: The SuperNode refuses this process, or is not reached.
        """
        from flwr.proto.runtime_pb2 import AcquireTaskRequest
        from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor

        response = self._client.AcquireTask(
            AcquireTaskRequest(supported_task_types=["flwr-clientapp"])
        )
        if not (response.HasField("task") and response.token):
            return None
        token = RuntimeTokenHttpInterceptor(response.token)
        return RuntimeTask(self._connect("flwr-clientapp", token))
