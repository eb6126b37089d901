"""Answer a SuperNode's messages in one process that stays: what one loads, the next one uses.

In:  the address of the SuperNode's Runtime API as an argument, and its secret as the first line of
     the standard input, which the SuperNode's process keeps open for as long as it lives.
Out: answers, by Flower's own calls (fedpet/protocol/flower_compat/flower_supernode.py).

Flower starts a new process for each message, which imports torch and loads the checkpoint anew. In
its place this process acquires the messages, which Flower's isolation mode "process" allows. The
server's bundle is never executed here: the fedpet that is installed answers, where the bundle names
its digest.

A second argument names a script of this machine whose Trainer trains the clients
(fedpet/client/trainer_script.py).
"""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
import time
import tomllib
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from fedpet.errors import FedpetError, FrameError
from fedpet.protocol.flower_compat.flower_supernode import RuntimeTask, RuntimeTasks
from fedpet.utils.gc_paused import gc_paused
from fedpet.utils.log_output import log_to_stderr
from fedpet.utils.paths import absolute
from fedpet.utils.source_digest import check_source_digest, code_digest

__all__ = ["answer_task", "main", "serve"]

PROJECT = "pyproject.toml"
MAX_PROJECT_BYTES = 1 << 20
SHORTEST_PAUSE, LONGEST_PAUSE = 0.1, 1.0  # seconds between questions to the SuperNode

LOG = logging.getLogger("fedpet")


class _Tasks(Protocol):
    def acquire(self) -> RuntimeTask | None: ...


def serve(
    tasks: _Tasks,
    answer: Callable[[RuntimeTask], None],
    *,
    sleep: Callable[[float], object] = time.sleep,
) -> None:
    """Answer messages until this process is ended.

    Where none waits it asks less and less often; where the SuperNode does not answer or has given
    the message up, the next one is asked for.
    """
    pause = SHORTEST_PAUSE
    while True:
        task = None
        try:
            if task := tasks.acquire():
                answer(task)
                pause = SHORTEST_PAUSE
        except Exception as error:  # of the connection: a node outlives its SuperNode's troubles
            LOG.warning("the SuperNode does not take or give a message: %s", error)
        finally:
            if task:
                task.close()
        if task is None:
            sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)


def answer_task(task: RuntimeTask, script: Path | None = None) -> None:
    """Answer one message by this process's node; an error is answered too, and logged here.

    What torch says may quote rows: of an error that is not fedpet's the server learns its type.
    """
    from fedpet.client.node import reply
    from fedpet.client.node_config import NodeConfig, refuse_script
    from fedpet.config import Experiment

    started, used = time.perf_counter(), time.process_time()
    message, context = task.message, task.context
    try:
        if code := _digest_in(task.bundle):
            check_source_digest(code)
        experiment = Experiment.from_run_config(context.run_config)
        refuse_script(experiment)
        config = NodeConfig.from_experiment(experiment, context.node_config)
        config = replace(config, script=script)
        answered = reply(message, config)
    except FedpetError as error:
        LOG.error("a %s message is refused: %s", message.metadata.message_type, error)
        task.fail(f"{type(error).__name__}: {error}")
    except Exception as error:
        LOG.error("a %s message failed", message.metadata.message_type, exc_info=error)
        task.fail(f"it failed with {type(error).__name__}: see the node's log.")
    else:
        task.answer(answered)
        LOG.info(
            "answered a %s message in %.2f s, %.2f s of processor time",
            message.metadata.message_type,
            time.perf_counter() - started,
            time.process_time() - used,
        )


def _digest_in(bundle: bytes) -> str:
    """Return the digest of fedpet that a bundle was made with; "" where it names none.

    Raises:
        FrameError: It is no bundle of an app, or its pyproject.toml is larger than one is.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(bundle)) as archive, archive.open(PROJECT) as file:
            text = file.read(MAX_PROJECT_BYTES + 1)
        if len(text) > MAX_PROJECT_BYTES:
            raise ValueError(f"more than {MAX_PROJECT_BYTES} bytes")
        named = tomllib.loads(text.decode()).get("tool", {}).get("fedpet", {})
        return str(named.get("code-digest", ""))
    except (ValueError, KeyError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise FrameError(f"the run's bundle has no {PROJECT} that can be read: {error}.") from None


def main() -> None:
    """Serve the SuperNode at the address that is the one argument."""
    log_to_stderr()
    address, *named = sys.argv[1:]
    script = absolute(named[0]) if named else None
    secret = bytes.fromhex(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with gc_paused():  # torch is imported here, before the first message
        import fedpet.client.node  # noqa: F401
    code_digest()  # of the files that were imported, not of those that an upgrade puts there
    LOG.info("worker %s is ready", os.getpid())
    try:
        serve(RuntimeTasks(address, secret), lambda task: answer_task(task, script))
    except KeyboardInterrupt:  # Flower's way to end a process whose token or secret is refused
        LOG.warning("worker %s was interrupted", os.getpid())
        os._exit(130)


def _end_with_parent() -> None:
    sys.stdin.read()  # returns when nobody holds the other end any more
    os._exit(0)


if __name__ == "__main__":
    main()
