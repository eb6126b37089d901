"""Run a SuperNode, and give its messages to a worker that stays, by Flower's Runtime API."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from flwr.app import Context, Error, Message
from flwr.common.constant import ErrorCode, SubStatus

__all__ = ["RuntimeTask", "RuntimeTasks", "run_supernode"]

_KEEPALIVE_SECONDS = 600.0
_IDLE_SECONDS = 3  # the sleep of Flower's loop after an empty pull


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
