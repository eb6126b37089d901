"""A round's training time is its longest node's, over all the messages that the node answered."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from fake_training import CLIENTS, NUM_VALUES, ShuffledGrid, make_strategy

from fedpet.protocol.frame import Frame, Refusal, RefusalCode, pack_frame, pack_refusal
from fedpet.server.aggregation import to_arrays
from fedpet.utils.seeds import client_id64


@pytest.mark.parametrize("asked_again", [(), CLIENTS[:1], CLIENTS[:4], CLIENTS])
def test_seconds_of_a_node_that_is_asked_again_are_added_up(asked_again: tuple[str, ...]) -> None:
    lost = {client_id64(name) for name in asked_again}

    def change(frame: Frame) -> bytes:
        if frame.client in lost:
            lost.remove(frame.client)
            refusal = (frame.plan_digest, frame.server_round, frame.client, "lost")
            return pack_refusal(Refusal(*refusal, RefusalCode.RESIDUAL_MISSING))
        return pack_frame(replace(frame, train_seconds=1.0))

    strategy = make_strategy("fedavg")
    start = to_arrays(np.zeros(NUM_VALUES, dtype=np.float32))
    strategy.start(ShuffledGrid(1, change=change), start, num_rounds=1)
    assert not lost
    assert strategy.ledger.current.replies == len(CLIENTS)
    assert strategy.ledger.current.train_seconds == len(CLIENTS)


def test_nodes_train_side_by_side_so_the_longest_one_counts() -> None:
    strategy = make_strategy("fedavg")
    start = to_arrays(np.zeros(NUM_VALUES, dtype=np.float32))
    grid = ShuffledGrid(2, change=lambda frame: pack_frame(replace(frame, train_seconds=1.0)))
    strategy.start(grid, start, num_rounds=1)
    longest = max(Counter(strategy.requests.homes.values()).values())
    assert strategy.ledger.current.train_seconds == longest < len(CLIENTS)
