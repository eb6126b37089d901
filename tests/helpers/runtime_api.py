"""A SuperNode's Runtime API on the loopback, with messages that no server sent."""

from __future__ import annotations

import hashlib
import io
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import tomli_w
import uvicorn
from flwr.app import Context, Message, RecordDict
from flwr.supercore.fab import Fab
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supernode.main import create_app
from flwr.supernode.nodestate import NodeStateFactory
from flwr.supernode.start_client_internal import _insert_message

from fedpet.protocol.flower_compat.flower_messages import make_reply
from fedpet.protocol.request import to_record

RUN, NODE = 7, 11


def bundle(project: Mapping[str, Any], **files: str) -> Fab:
    """A bundle with this pyproject.toml and these other files."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("pyproject.toml", tomli_w.dumps(project))
        for name, text in files.items():
            archive.writestr(f"{name}.py", text)
    content = stream.getvalue()
    return Fab(hashlib.sha256(content).hexdigest(), content, {})


class RuntimeApi:
    """A node's state, and the address that a worker reaches it at."""

    def __init__(self, port: int, state: Any) -> None:
        self.address = f"127.0.0.1:{port}"
        self.state = state

    def put(
        self,
        payload: bytes,
        *,
        fab: Fab | None = None,
        run_config: Mapping[str, Any] | None = None,
        node_config: Mapping[str, Any] | None = None,
    ) -> None:
        """Put a message there, as if the server had sent it."""
        fab = fab or bundle({})
        run = Run.create_empty(RUN)
        run.fab_hash = fab.hash_str
        context = Context(
            run_id=RUN,
            node_id=NODE,
            node_config=dict(node_config or {}),
            state=RecordDict(),
            run_config=dict(run_config or {}),
            series_id=run.series_id,
        )
        self.state.set_run_series_context(run.series_id, context)
        self.state.store_run(run)
        self.state.store_fab(fab)
        self.state.create_task(task_type="flwr-clientapp", run_id=RUN, fab_hash=fab.hash_str)
        message = make_reply(to_record(payload), node=1, asked="")
        message.metadata.__dict__.update(_run_id=RUN, _dst_node_id=NODE, _ttl=60.0)
        _insert_message(message, self.state, self.state.object_store)

    def replies(self) -> list[Message]:
        """The answers so far, without their content, which lies in the object store."""
        return list(self.state.get_messages_legacy(is_reply=True))


@contextmanager
def runtime_api(secret: bytes) -> Iterator[RuntimeApi]:
    """Serve a node's Runtime API until the block is left."""
    factory = NodeStateFactory(objectstore_factory=ObjectStoreFactory())
    state = factory.state()
    state.set_node_id(NODE)
    app = create_app(state_factory=factory, superexec_auth_secret=secret)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
        port = server.servers[0].sockets[0].getsockname()[1]
        yield RuntimeApi(port, state)
    finally:
        server.should_exit = True
        thread.join()
