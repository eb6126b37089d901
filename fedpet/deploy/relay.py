"""Relay a SuperLink's fleet path to its nodes, and nothing else of it.

SuperLink serves nodes, submitters of runs and the runners of tasks on one port, and asks only nodes
for a key: whoever reaches that port can run code on every node. So it listens on the loopback, and
this process stands before it:

    a device -- TLS --> relay -- TLS, loopback --> SuperLink

TLS ends here, since no path is known without reading it. A request is passed on if it is a POST to
`/v1/fleet/`, of a node whose public key lies in the folder of allowed nodes, within its rate, and
its body within the bound of its path; SuperLink then checks the signature. An unknown key may only
try to register, which SuperLink answers with its code for that. What is refused gets a line in
`relay.log`. A body's length is checked before it is read, and a reply's objects are added up by the
push session that SuperLink gave them: no node stores more than a reply's bound there.

A second socket, on the loopback alone, answers `/health` and `/metrics`
(fedpet/deploy/server_metrics.py). What is known of each node is written to `node-status.json`.

    python -m fedpet.deploy.relay --port 8000 --own-port 8001 --monitor-port 8002
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import binascii
import contextlib
import logging
import os
import re
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from fedpet.deploy import server_metrics
from fedpet.deploy.node_status import STATUS_FILE, NodeStatus, noted, read_status
from fedpet.deploy.relay_limits import Bucket, Limits
from fedpet.errors import ConfigError
from fedpet.server.allowed_nodes import AllowedNodes

__all__ = ["Relay"]

LOG_FILE, LOG_BYTES, LOG_FILES = "relay.log", 4 << 20, 4
KEY_HEADER, VERSION_HEADER = b"flwr-public-key", b"flwr-package-version"

_PATH = re.compile(rb"/v1/fleet/([a-z-]{1,40})")
_FIRST_WORDS = ("register-node", "activate-node")  # of a node whose key is unknown, too
_NOT_PASSED_ON = frozenset(
    b"authorization connection content-length cookie forwarded host keep-alive "
    b"proxy-authorization te trailer transfer-encoding upgrade".split()
)
_NOT_PASSED_BACK = frozenset(b"connection keep-alive transfer-encoding upgrade server date".split())

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

LOG = logging.getLogger("fedpet.relay")


class _Refusal(Exception):
    """A request that is not passed on, with its HTTP status."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Relay:
    """Pass on requests: an ASGI application.

    Args:
        superlink: Client whose base URL is SuperLink's.
        allowed: The nodes that may speak.
        limits: Bounds of each.
        status: Counts so far, by name; they are added to.
        monitor_port: Port whose requests ask for health and metrics.
        metrics: Gives the page of metrics; None where the library is not installed.
    """

    def __init__(
        self,
        superlink: httpx.AsyncClient,
        allowed: AllowedNodes,
        *,
        limits: Limits | None = None,
        status: dict[str, NodeStatus] | None = None,
        monitor_port: int = 0,
        metrics: Callable[[Mapping[str, NodeStatus]], bytes] | None = None,
    ) -> None:
        self.status = {} if status is None else status
        self._superlink = superlink
        self._allowed = allowed
        self._limits = limits or Limits()
        self._monitor_port = monitor_port
        self._metrics = metrics
        self._buckets: dict[str, Bucket] = {}
        self._sessions: dict[str, dict[bytes, tuple[float, int]]] = {}
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        if scope["path"] == "/health" and scope["method"] in ("GET", "HEAD"):
            await _answer(send, *await self._health())
        elif self._monitor_port and scope["server"][1] == self._monitor_port:
            await _answer(send, *await self._monitor(scope["path"]))
        else:
            await self._relay(scope, receive, send)

    async def _health(self) -> tuple[int, bytes]:
        try:
            up = (await self._superlink.get("/health", timeout=2.0)).is_success
        except httpx.HTTPError:
            up = False
        return (200, b"ok\n") if up else (503, b"SuperLink does not answer\n")

    async def _monitor(self, path: str) -> tuple[int, bytes]:
        if path != "/metrics":
            return 404, b"/health or /metrics\n"
        if self._metrics is None:
            return 501, b"metrics need prometheus-client: pip install 'fedpet[metrics]'\n"
        return 200, await asyncio.to_thread(self._metrics, self.status)

    async def _relay(self, scope: Scope, receive: Receive, send: Send) -> None:
        address, who = (scope["client"] or ("?",))[0], ""
        headers: dict[bytes, bytes] = dict(scope["headers"])
        try:
            word = self._word(scope)
            who = self._name(headers, address, word)
            self._check_rate(who)
            length = self._length(headers, word)
            self._held += length
            try:
                body = await self._body(receive, length)
                if word == "push-object":
                    self._count_reply(who, body)
                if who and who in self.status:
                    self.status[who].received_bytes += len(body)
                await self._pass_on(scope, body, send, who)
            finally:
                self._held -= length
        except _Refusal as refusal:
            if who in self.status:
                self.status[who].refused += 1
            path = scope["raw_path"][:80].decode("ascii", "backslashreplace")
            LOG.warning(
                "%s %s %a: %s %s", who or address, scope["method"], path, refusal.status, refusal
            )
            await _answer(send, refusal.status, f"{refusal}\n".encode())

    def _word(self, scope: Scope) -> str:
        match = _PATH.fullmatch(scope["raw_path"])
        if match is None or scope["method"] != "POST" or scope["query_string"]:
            raise _Refusal(403, "only nodes are served here.")
        return match[1].decode()

    def _name(self, headers: Mapping[bytes, bytes], address: str, word: str) -> str:
        """Return the name of the node whose key a request shows; "" of an unknown one."""
        with contextlib.suppress(ConfigError, OSError):  # half written: the last that read stands
            self._allowed.refresh(self._limits.folder_seconds)
        try:
            key = base64.b64decode(headers.get(KEY_HEADER, b"")[:4096], validate=True)
        except binascii.Error:
            key = b""
        limits, node = self._limits, self._allowed.of_key(key)
        if node is None:
            bucket = Bucket(limits.stranger_rate, 10 * limits.stranger_rate)
            if len(self._buckets) > 10_000:  # of addresses that came once
                self._buckets.clear()
            if not self._buckets.setdefault(f"@{address}", bucket).take():
                raise _Refusal(503, "too many requests of unknown keys.")
            if word not in _FIRST_WORDS:
                raise _Refusal(401, "this key is none of the nodes'.")
            return ""
        status = self.status.setdefault(node.name, NodeStatus(first_seen=time.time()))
        status.last_seen, status.address = time.time(), address
        version = headers.get(VERSION_HEADER, b"")[:40].decode("ascii", "replace")
        status.flower_version = "".join(c for c in version if c.isalnum() or c in ".+-")
        status.requests += 1
        return node.name

    def _check_rate(self, who: str) -> None:
        limits = self._limits
        if not who:
            return
        bucket = self._buckets.setdefault(who, Bucket(limits.rate, limits.burst))
        if not bucket.take():  # a status at which Flower's client tries again
            raise _Refusal(503, f"more than {limits.rate:g} requests a second.")

    def _length(self, headers: Mapping[bytes, bytes], word: str) -> int:
        text, most = headers.get(b"content-length", b""), self._limits.of_path(word)
        if not text.isdigit() or b"transfer-encoding" in headers:
            raise _Refusal(411, "a body's length must be stated.")
        if len(text) > 12 or (length := int(text)) > most:
            raise _Refusal(413, f"a body of {text.decode()[:20]} bytes, {most} at most.")
        if self._held + length > self._limits.held_bytes:
            raise _Refusal(503, "too much at one time.")
        return length

    async def _body(self, receive: Receive, length: int) -> bytes:
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while True:
                    event = await receive()
                    if event["type"] == "http.disconnect":
                        raise _Refusal(400, "the connection broke off.")
                    body += event.get("body", b"")
                    if len(body) > length:
                        raise _Refusal(413, "the body is longer than stated.")
                    if not event.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise _Refusal(408, "the body did not come in time.") from None

    def _count_reply(self, who: str, body: bytes) -> None:
        session = _field(body, 5)
        if not session:
            raise _Refusal(400, "an object belongs to a push session.")
        now, own = time.monotonic(), self._sessions.setdefault(who, {})
        for old in [one for one, (at, _) in own.items() if now - at > 3600]:
            del own[old]
        if session not in own and len(own) >= self._limits.sessions:
            del own[min(own, key=lambda one: own[one][0])]
        total = own.get(session, (now, 0))[1] + len(body)
        if total > self._limits.reply_bytes:
            raise _Refusal(413, f"a reply has at most {self._limits.reply_bytes} bytes.")
        own[session] = now, total

    async def _pass_on(self, scope: Scope, body: bytes, send: Send, who: str) -> None:
        headers = [(k, v) for k, v in scope["headers"] if k not in _NOT_PASSED_ON]
        request = self._superlink.build_request(
            "POST", scope["raw_path"].decode(), content=body, headers=headers
        )
        try:
            response = await self._superlink.send(request, stream=True)
        except httpx.HTTPError as error:
            raise _Refusal(502, f"SuperLink does not answer: {type(error).__name__}.") from None
        async with contextlib.aclosing(response):
            raw = [(name.lower(), value) for name, value in response.headers.raw]
            kept = [(name, value) for name, value in raw if name not in _NOT_PASSED_BACK]
            start = {"type": "http.response.start", "status": response.status_code}
            await send({**start, "headers": kept})
            sent = 0
            async for part in response.aiter_raw():
                sent += len(part)
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        if who in self.status:
            self.status[who].sent_bytes += sent
        if response.is_error:
            LOG.warning("%s %s: SuperLink says %s", who or "?", scope["path"], response.status_code)


async def _answer(send: Send, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _field(message: bytes, wanted: int) -> bytes:
    """Return the last bytes field of this number in a protobuf message; b"" where there is none.

    Protobuf's own reader would cost the relay half its memory.
    """
    found, at = b"", 0
    try:
        while at < len(message):
            tag, at = _varint(message, at)
            if tag & 7 == 0:
                _, at = _varint(message, at)
            elif tag & 7 == 2:
                size, at = _varint(message, at)
                if at + size > len(message):
                    raise IndexError
                if tag >> 3 == wanted:
                    found = message[at : at + size]
                at += size
            else:
                at += {1: 8, 5: 4}[tag & 7]
    except (IndexError, KeyError):
        raise _Refusal(400, "the body does not read.") from None
    return found


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise IndexError


# -- the process ----------------------------------------------------------------------------------


async def serve(arguments: argparse.Namespace) -> None:
    """Serve until the process is told to end."""
    folder = arguments.folder
    status = read_status(folder / STATUS_FILE)
    context = ssl.create_default_context(cafile=str(folder / "ca.crt"))
    pool = httpx.Limits(max_connections=256, max_keepalive_connections=32)
    superlink = f"https://127.0.0.1:{arguments.own_port}"
    async with httpx.AsyncClient(
        base_url=superlink, verify=context, timeout=120.0, limits=pool, trust_env=False
    ) as client:
        limits = Limits(
            reply_bytes=arguments.reply_mib << 20, rate=arguments.rate, burst=10 * arguments.rate
        )
        app = Relay(
            client,
            AllowedNodes(folder / "nodes"),
            limits=limits,
            status=status,
            monitor_port=arguments.monitor_port,
            metrics=server_metrics.page_of(folder),
        )
        config = uvicorn.Config(
            app,
            access_log=False,
            log_config=None,
            ssl_certfile=str(folder / "server.pem"),
            ssl_keyfile=str(folder / "server.key"),
            lifespan="off",
            http="h11",  # bounds the headers, too
            limit_concurrency=1000,
            h11_max_incomplete_event_size=64 << 10,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=5,
            timeout_keep_alive=150,  # an idle node asks every minute; a handshake costs more
        )
        sockets = [_listen(arguments.bind, arguments.port)]
        if arguments.monitor_port:
            sockets.append(_listen("127.0.0.1", arguments.monitor_port))
        async with noted(folder / STATUS_FILE, status):
            LOG.warning("relaying %s:%s to %s", arguments.bind, arguments.port, superlink)
            await uvicorn.Server(config).serve(sockets)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind((host, port))
    return listening


def main() -> None:
    """Run the relay of a server's folder."""
    parser = argparse.ArgumentParser(prog="fedpet.deploy.relay", description=(__doc__ or "")[:72])
    parser.add_argument("--folder", type=Path, default=Path(), help="of the server")
    parser.add_argument("--bind", default="127.0.0.1", help="address that nodes reach")
    parser.add_argument("--port", type=int, required=True, help="port that nodes reach")
    parser.add_argument("--own-port", type=int, required=True, help="SuperLink's, on the loopback")
    parser.add_argument("--monitor-port", type=int, default=0, help="of /health and /metrics")
    parser.add_argument("--reply-mib", type=int, default=64, help="most MiB of one reply")
    parser.add_argument("--rate", type=float, default=30.0, help="requests a second of a node")
    arguments = parser.parse_args()
    os.umask(0o077)
    handler = RotatingFileHandler(
        arguments.folder / LOG_FILE, maxBytes=LOG_BYTES, backupCount=LOG_FILES - 1
    )
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    LOG.addHandler(handler)
    LOG.propagate = False
    asyncio.run(serve(arguments))


if __name__ == "__main__":
    main()
