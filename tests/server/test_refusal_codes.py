"""A server acts on the code of a refusal, and on no word of its reason."""

from __future__ import annotations

import numpy as np
import pytest
from fake_training import CLIENTS, NUM_VALUES, Change, ShuffledGrid, make_strategy

from fedpet.protocol.frame import Frame, Refusal, RefusalCode, pack_frame, pack_refusal
from fedpet.protocol.ledger import RoundRecord
from fedpet.server.aggregation import to_arrays
from fedpet.utils.seeds import client_id64


def one_round(change: Change) -> RoundRecord:
    strategy = make_strategy("fedavg", quorum=0.5)
    start = to_arrays(np.zeros(NUM_VALUES, dtype=np.float32))
    strategy.start(ShuffledGrid(1, change=change), start, num_rounds=1)
    return strategy.ledger.current


def refuse_once(*refusal: object, clients: tuple[str, ...] = CLIENTS[:1]) -> Change:
    """Refuse the first request for these clients, and answer the second."""
    waiting = {client_id64(name) for name in clients}

    def change(frame: Frame) -> bytes:
        if frame.client not in waiting:
            return pack_frame(frame)
        waiting.remove(frame.client)
        header = (frame.plan_digest, frame.server_round, frame.client)
        return pack_refusal(Refusal(*header, *refusal))  # type: ignore[arg-type]

    return change


ASKED_AGAIN = (
    RefusalCode.PLAN_MISSING,
    RefusalCode.REFERENCE_MISSING,
    RefusalCode.RESIDUAL_MISSING,
)


@pytest.mark.parametrize("code", ASKED_AGAIN)
@pytest.mark.parametrize("reason", ["", "entbehrt", "this node does not hold the plan"])
def test_a_client_is_asked_again_by_the_code_whatever_the_reason(
    code: RefusalCode, reason: str
) -> None:
    record = one_round(refuse_once(reason, code, clients=CLIENTS))
    assert (record.replies, record.refused) == (len(CLIENTS), [])


@pytest.mark.parametrize(
    "reason",
    [
        "this node does not hold the plan",
        "this node does not hold the reference that the changes are of",
        "this node does not hold the residual of the client's last accepted round",
        "this node's tier is of density 0.005",
    ],
)
def test_a_reason_without_its_code_asks_for_nothing(reason: str) -> None:
    record = one_round(refuse_once(reason))
    [refused] = record.refused
    assert refused["reason"] == reason
    assert record.replies == len(CLIENTS) - 1


def test_an_unknown_code_refuses_the_client_and_is_told_in_the_ledger() -> None:
    [refused] = one_round(refuse_once("out of battery", 77)).refused
    assert "refusal code 77, unknown to this version of fedpet: out of battery" in refused["reason"]


def test_a_tier_that_the_plan_does_not_have_refuses_the_client() -> None:
    record = one_round(refuse_once("mine is smaller", RefusalCode.OTHER_TIER, 0.123))
    [refused] = record.refused
    assert refused["reason"] == "mine is smaller"
