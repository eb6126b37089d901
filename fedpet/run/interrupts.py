"""Stop from outside: Ctrl-C (SIGINT) and SIGTERM raise KeyboardInterrupt, once.

SIGTERM is what a scheduler, `docker stop` and `kill` send; Ray would end the process for it with a
trace of its own. What is stopped takes a few seconds to clear away: a second signal meanwhile, of
an impatient user or of a scheduler that sends both, would only leave things lying about, and is
passed over. A third is heard again.

An exception in the main thread can be lost, in somebody's callback, or wait for others that do not
know of it; and where the system hands a signal to a thread of Ray's, a main thread that waits is
not woken. So a thread listens too, and a simulation's server looks whether to stop (`Heeding`).
"""

from __future__ import annotations

import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from flwr.app import Message

from fedpet.errors import RunError, RunInterrupted, Stalled
from fedpet.server.reply_stream import GridWrapper

DEFAULTS: dict[int, Any] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
}

PATIENCE = 30.0  # seconds until the signal is sent again; the third one is heard

_stopping = threading.Event()  # signals are the process's, and so is this


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


class Heeding(GridWrapper):
    """A Grid that ends the server's thread when the process is to stop."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Receive what has come."""
        if _stopping.is_set():
            raise SystemExit  # which ends a thread without a word
        return super().pull_messages(message_ids)


@contextmanager
def stoppable(how_to_go_on: Callable[[], str]) -> Iterator[None]:
    """Say how to go on with what was stopped inside, by a signal or for want of an average.

    Signals for which somebody else has set a handler are left to that one.

    Args:
        how_to_go_on: Gives a sentence, asked when everything is cleared away.

    Raises:
        Interrupted: A signal came.
        RunError: Too many rounds in a row came to no average.
    """
    caught: list[int] = []
    logger = logging.getLogger("flwr")
    level = logger.level

    def stop(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        _stopping.set()
        # What is under way fails now, and Flower would print where.
        logger.setLevel(logging.CRITICAL + 1)
        if len(caught) != 2:
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    def interrupted() -> RunInterrupted:
        number = signal.SIGTERM if signal.SIGTERM in caught else signal.SIGINT
        return RunInterrupted(f"Interrupted. {how_to_go_on()}", exit_code=128 + number)

    numbers: list[int] = []
    if threading.current_thread() is threading.main_thread():
        numbers = [n for n, handler in DEFAULTS.items() if signal.getsignal(n) is handler]
    for number in numbers:
        signal.signal(number, stop)
    _stopping.clear()
    try:
        with _listening(numbers):
            yield
    except KeyboardInterrupt as stopped:
        if isinstance(stopped, Terminated):
            caught.append(signal.SIGTERM)  # heard by somebody else
        raise interrupted() from None
    except Stalled as stalled:
        raise RunError(f"{stalled} {how_to_go_on()}") from None
    except Exception:  # of what had been under way
        if caught:
            raise interrupted() from None
        raise
    finally:
        logger.setLevel(level)
        for number in numbers:
            signal.signal(number, DEFAULTS[number])


@contextmanager
def _listening(numbers: list[int]) -> Iterator[None]:
    """Note signals of these numbers whatever the main thread does, and send a lost one again."""
    if not numbers:
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    main = threading.get_ident()

    def listen() -> None:
        number = 0
        with reader:
            while True:
                try:
                    heard = reader.recv(1)
                except TimeoutError:
                    signal.pthread_kill(main, number)
                    continue
                if not heard:
                    return
                if heard[0] in numbers:
                    number = heard[0]
                    _stopping.set()
                    reader.settimeout(PATIENCE)

    threading.Thread(target=listen, daemon=True).start()
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        writer.close()  # with which the thread ends
