"""Keep Python's cyclic collector from scanning loaded libraries and models.

Importing torch and transformers makes objects by the hundred thousand, all of which stay; Python's
cyclic collector goes through them again and again, for a sixth of the time. A device pays that for
every message, since Flower starts a process for each. And Flower collects by itself: every round,
and with some rules for every reply.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_inside = 0  # how many times `kept_from_collection` is entered


@contextmanager
def gc_paused() -> Iterator[None]:
    """Leave the cyclic collector off inside; on again afterwards if it was on."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def kept_from_collection() -> Iterator[None]:
    """Leave all objects that exist now out of every collection inside.

    Afterwards they are scanned again, unless objects had been left out before.
    """
    global _inside
    alone = not _inside and not gc.get_freeze_count()  # the count goes through all that are frozen
    if alone:
        gc.collect()
    gc.freeze()
    _inside += 1
    try:
        yield
    finally:
        _inside -= 1
        if alone:
            gc.unfreeze()
