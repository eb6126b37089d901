"""Count every byte between each node and the server in a proxy, by purpose.

In:  a deployment's server, with its certificate and key.
Out: for each node a port in the server's place; afterwards the bytes each way, and the requests.

Two relays, one behind the other, in the node's way to the server:

    node --TLS--> [count] --TLS--> [open, note, seal] --TLS--> SuperLink

The first sees what a socket sees. The second holds the server's key, and sees the HTTP requests
that Flower makes, so that each byte of the first count has a purpose.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

_CHUNK = 1 << 16
_HEAD_END = b"\r\n\r\n"


@dataclass
class Connection:
    """Read one connection of a node, on the server's side of the proxy.

    Attributes:
        asked: All that the node sent, opened.
        answered: All that the server sent, opened.
    """

    asked: bytearray = field(default_factory=bytearray)
    answered: bytearray = field(default_factory=bytearray)

    def exchanges(self) -> Iterator[Exchange]:
        """Return the whole requests on it, in order, each with its answer."""
        asked, answered = _http_messages(bytes(self.asked)), _http_messages(bytes(self.answered))
        for (head, body), (answer_head, answer) in zip(asked, answered, strict=False):
            path = head.split(b" ", 2)[1].decode("ascii")
            up, down = len(head) + len(body), len(answer_head) + len(answer)
            yield Exchange(path, up, down, body, answer)


@dataclass(frozen=True)
class Exchange:
    """Hold one HTTP request and its answer.

    Attributes:
        path: What was asked for.
        up_bytes: Of the request, head included.
        down_bytes: Of the answer, head included.
        body: The request's.
        answer: The answer's.
    """

    path: str
    up_bytes: int
    down_bytes: int
    body: bytes
    answer: bytes


@dataclass
class Tapped:
    """Hold one node's traffic.

    Attributes:
        up_bytes: From the node, as the socket counts them: sealed.
        down_bytes: To the node, likewise.
        sockets: How many connections were made.
        connections: What was in those over which anything was asked.
    """

    up_bytes: int = 0
    down_bytes: int = 0
    sockets: int = 0
    connections: list[Connection] = field(default_factory=list)

    def exchanges(self) -> list[Exchange]:
        """All requests of the node."""
        return [exchange for one in self.connections for exchange in one.exchanges()]


class Wiretap:
    """Run the proxies of all nodes of one deployment, on the loopback.

    Args:
        server: The deployment's `server` folder, with certificate, key and authority.
        port: The server's.
    """

    def __init__(self, server: Path, port: int) -> None:
        self._port = port
        self._sealing = ssl.create_default_context(cafile=str(server / "ca.crt"))
        self._opening = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._opening.load_cert_chain(server / "server.pem", server / "server.key")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._servers: list[asyncio.Server] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.nodes: dict[str, Tapped] = {}

    def __enter__(self) -> Wiretap:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def tap(self, name: str) -> int:
        """Open a proxy for a node; gives the port that stands for the server's."""
        tapped = self.nodes[name] = Tapped()
        return asyncio.run_coroutine_threadsafe(self._listen(tapped), self._loop).result()

    async def _listen(self, tapped: Tapped) -> int:
        async def opened(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            inside = Connection()
            tapped.connections.append(inside)
            there = await asyncio.open_connection("127.0.0.1", self._port, ssl=self._sealing)
            await _relay((reader, writer), there, inside.asked.extend, inside.answered.extend)

        inner = await self._serve(opened, self._opening)

        def up(data: bytes) -> None:
            tapped.up_bytes += len(data)

        def down(data: bytes) -> None:
            tapped.down_bytes += len(data)

        async def counted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            tapped.sockets += 1
            there = await asyncio.open_connection("127.0.0.1", inner)
            await _relay((reader, writer), there, up, down)

        return await self._serve(counted, None)

    async def _serve(
        self,
        answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
        context: ssl.SSLContext | None,
    ) -> int:
        async def kept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            self._tasks.add(task)
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await answer(reader, writer)
            await _end(writer)
            self._tasks.discard(task)

        server = await asyncio.start_server(kept, "127.0.0.1", 0, ssl=context)
        self._servers.append(server)
        port: int = server.sockets[0].getsockname()[1]
        return port

    async def _close(self) -> None:
        for server in self._servers:
            server.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


_Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def _relay(
    here: _Stream, there: _Stream, up: Callable[[bytes], None], down: Callable[[bytes], None]
) -> None:
    """Pass on what comes either way, noted, until one side ends."""

    async def pass_on(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, note: Callable[[bytes], None]
    ) -> None:
        while data := await reader.read(_CHUNK):
            note(data)
            writer.write(data)
            await writer.drain()

    ways = [
        asyncio.ensure_future(pass_on(here[0], there[1], up)),
        asyncio.ensure_future(pass_on(there[0], here[1], down)),
    ]
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        # What is on its way when one side closes its end still arrives.
        await asyncio.wait(ways, timeout=1)
    finally:
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
        await _end(there[1])


async def _end(writer: asyncio.StreamWriter) -> None:
    """Close a connection, and its socket with it: a loop that is stopped closes none."""
    writer.close()
    with contextlib.suppress(OSError, asyncio.TimeoutError):
        await asyncio.wait_for(writer.wait_closed(), timeout=1)


def _http_messages(stream: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Each whole HTTP/1.1 message of a stream: its head with the empty line, and its body.

    Raises:
        ValueError: A body is chunked or compressed, which Flower's are not.
    """
    offset = 0
    while (end := stream.find(_HEAD_END, offset)) >= 0:
        head = stream[offset : end + len(_HEAD_END)]
        lines = head.lower().split(b"\r\n")
        if any(line.startswith((b"transfer-encoding:", b"content-encoding:")) for line in lines):
            raise ValueError(f"a body is neither chunked nor compressed, got {head!r}.")
        length = sum(int(line[15:]) for line in lines if line.startswith(b"content-length:"))
        offset = end + len(_HEAD_END) + length
        if offset > len(stream):
            return  # cut off: the node was ended
        yield head, stream[offset - length : offset]
