"""Stop from outside: Ctrl-C (SIGINT) and SIGTERM raise KeyboardInterrupt, once.

SIGTERM is what a scheduler, `docker stop` and `kill` send; Ray would end the process for it with a
trace of its own. What is stopped takes a few seconds to clear away: a second signal meanwhile, of
an impatient user or of a scheduler that sends both, would only leave things lying about, and is
passed over. A third is heard again.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from fedpet.errors import Interrupted, RunError, Stalled

DEFAULTS: dict[int, Any] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
}


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


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

    def stop(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        # What is under way fails now, and Flower would print where.
        logging.getLogger("flwr").setLevel(logging.CRITICAL + 1)
        if len(caught) != 2:
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    numbers = []
    if threading.current_thread() is threading.main_thread():
        numbers = [n for n, handler in DEFAULTS.items() if signal.getsignal(n) is handler]
    for number in numbers:
        signal.signal(number, stop)
    try:
        yield
    except KeyboardInterrupt as stopped:
        terminated = isinstance(stopped, Terminated) or signal.SIGTERM in caught
        code = 128 + (signal.SIGTERM if terminated else signal.SIGINT)
        raise Interrupted(f"Interrupted. {how_to_go_on()}", exit_code=code) from None
    except Stalled as stalled:
        raise RunError(f"{stalled} {how_to_go_on()}") from None
    finally:
        for number in numbers:
            signal.signal(number, DEFAULTS[number])
