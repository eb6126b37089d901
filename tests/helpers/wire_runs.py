"""Runs of a federation without a model, for the tests of what its wire carries and keeps."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from modelless import FakeNode, Forgetful, Handler, make_plan, make_strategy, node_settings, start
from sending import codec_of

from fedpet.config import CodecConfig, MaskConfig

CHANGES = codec_of(uplink="eden-4", downlink="eden-3")
VALUES = codec_of(uplink="dither-3", downlink="dither-5", downlink_mode="full")  # of `make run`
VALUES_FEEDBACK = replace(
    VALUES, uplink="topk-0.1+eden-4", head_downlink="int8", error_feedback=True
)
FEEDBACK = codec_of(uplink="topk-0.1+eden-4", error_feedback=True)
ALL = codec_of(
    uplink="topk-0.1+eden-4",
    head_uplink="int8",
    downlink="eden-2",
    head_downlink="int4",
    error_feedback=True,
)


def runs_in(folder: Path) -> Callable[..., tuple[np.ndarray, Any, list[int]]]:
    """Runs rounds on nodes of one machine; gives the values, the books and the sizes of requests.

    The first run's nodes keep what they know in `cache0` of the folder, the second's in `cache1`.
    """
    counter = itertools.count()

    def play(
        codec: CodecConfig,
        nodes: int = 1,
        rounds: int = 6,
        mask: MaskConfig | None = None,
        spoil: Callable[[Handler], Handler] = lambda handler: handler,
        forgetful: bool = False,
        **changes: Any,
    ) -> tuple[np.ndarray, Any, list[int]]:
        strategy = make_strategy(make_plan(codec, mask), **changes)
        cache = folder / f"cache{next(counter)}"
        kind = Forgetful if forgetful else lambda c: FakeNode(node_settings(c))
        sizes: list[int] = []

        def listening(handler: Handler) -> Handler:
            def answer(payload: bytes) -> bytes:
                sizes.append(len(payload))
                return handler(payload)

            return answer

        handlers = {n + 1: listening(spoil(kind(cache).answer)) for n in range(nodes)}
        return start(strategy, handlers, rounds), strategy.ledger, sizes

    return play
