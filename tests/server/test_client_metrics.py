"""A client's own metric is a stranger's word: what cannot be is refused by name (law 7)."""

from __future__ import annotations

import hashlib
import math
import struct
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fake_training import CLIENTS, NUM_VALUES, ROWS, ShuffledGrid, make_plan, make_strategy
from frame_mutations import forge
from hypothesis import given
from hypothesis import strategies as st

from fedpet.config import ClientEvaluation
from fedpet.errors import FrameError
from fedpet.protocol.client_metric import SECTION_BYTES, ClientMetric
from fedpet.protocol.frame import (
    HEADER_BYTES,
    Frame,
    Measured,
    pack_frame,
    pack_measured,
    unpack_frames,
)
from fedpet.server.aggregation import to_arrays
from fedpet.utils.seeds import client_id64

RULE = ClientEvaluation(fraction=0.2, min_rows=2, values="both", unseen_fraction=0.0, seed=0)
DIGEST = bytes(range(16))
FRAME = Frame(DIGEST, 3, 0xFEEDFACE, "eden-4", 54_321, 120, 0.6931, 12.5, b"payload")
METRIC = ClientMetric(4, 0.25, 0.5, 1.5)
LIAR = CLIENTS[4]
GOLDEN_FRAME = "843d314523eeac2ec1c2f57f715d955bea8c812910a7c4d0f2b7b8ee83712ce4"


def unpack(packed: bytes, bound: int = 10_000) -> list[Any]:
    return list(unpack_frames(packed, max_frames=8, max_payload_bytes=bound))


# -- the wire --------------------------------------------------------------------------------


def test_a_frame_without_a_metric_has_the_bytes_that_it_always_had() -> None:
    """The digest is that of the version before there was a section."""
    assert hashlib.sha256(pack_frame(FRAME)).hexdigest() == GOLDEN_FRAME


@given(
    rows=st.integers(1, 2**32 - 1),
    before=st.none() | st.floats(-1e300, 1e300),
    after=st.none() | st.floats(-1e300, 1e300),
    seconds=st.floats(0, 1e9, width=32),
)
def test_a_metric_comes_back_as_it_was(
    rows: int, before: float | None, after: float | None, seconds: float
) -> None:
    metric = ClientMetric(rows, before, after, seconds)
    frame, alone = replace(FRAME, metric=metric), Measured(DIGEST, 3, 7, metric)
    packed = pack_frame(frame) + pack_measured(alone)
    assert len(packed) == 2 * (HEADER_BYTES + SECTION_BYTES) + len(b"payload")
    assert len(packed) == frame.num_bytes + alone.num_bytes
    assert unpack(packed) == [frame, alone]


def test_a_value_that_is_not_finite_is_sent_as_none() -> None:
    metric = ClientMetric(3, math.nan, math.inf)
    [found] = unpack(pack_frame(replace(FRAME, metric=metric)))
    assert (found.metric.before, found.metric.after) == (None, None)


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ((4, 3, 0.5, 0.5, 1.0), "flags up to 3 and at least one row"),
        ((3, 0, 0.5, 0.5, 1.0), "flags up to 3 and at least one row"),
        ((3, 3, math.nan, 0.5, 1.0), "finite values"),
        ((3, 3, 0.5, math.inf, 1.0), "finite values"),
        ((1, 3, 0.5, 0.5, 1.0), "finite values where its flags name them"),
        ((3, 3, 0.5, 0.5, -1.0), "seconds"),
        ((3, 3, 0.5, 0.5, math.nan), "seconds"),
    ],
)
def test_a_forged_section_is_refused_for_what_is_wrong_with_it(
    section: tuple[Any, ...], says: str
) -> None:
    packed = bytearray(pack_frame(replace(FRAME, metric=METRIC)))
    packed[HEADER_BYTES : HEADER_BYTES + SECTION_BYTES] = struct.pack("<BIddf", *section)
    with pytest.raises(FrameError, match=says):
        unpack(forge(bytes(packed)))


def test_a_section_does_not_make_room_for_a_longer_payload() -> None:
    packed = pack_frame(replace(FRAME, metric=METRIC))
    assert unpack(packed, bound=len(b"payload"))
    with pytest.raises(FrameError, match="may have a payload"):
        unpack(packed, bound=len(b"payload") - 1)


# -- the server ------------------------------------------------------------------------------


def play(change: Any, rule: ClientEvaluation | None = RULE) -> Any:
    """Run a round in which every client answers; gives the round's record.

    Its clients train on all rows but two, of which they hold both out.
    """
    strategy = make_strategy("fedavg", make_plan(evaluation=rule))

    def answer(frame: Frame) -> bytes:
        return pack_frame(change(replace(frame, num_examples=frame.num_examples - 2)))

    values = to_arrays(np.zeros(NUM_VALUES, dtype=np.float32))
    strategy.start(ShuffledGrid(2, change=answer), values, num_rounds=1, timeout=60.0)
    return strategy.ledger.current


def lying(**fields: Any) -> Any:
    """Let one client send another metric than the others."""

    def change(frame: Frame) -> Frame:
        metric = ClientMetric(2, 0.5, 1.0)
        if frame.client == client_id64(LIAR):
            metric = replace(metric, **fields)
        return replace(frame, metric=metric)

    return change


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"before": 1.5}, "accuracy lies between 0 and 1, got 1.5"),
        ({"after": -0.1}, "accuracy lies between 0 and 1, got -0.1"),
        ({"num_rows": 3}, "at most the 2 rows that the client has for it, got 3"),
        ({"num_rows": 2**32 - 1}, "at most the 2 rows"),
    ],
)
def test_hostile_figures_are_refused_by_name(fields: dict[str, Any], says: str) -> None:
    record = play(lying(**fields))
    [refused] = record.refused
    assert refused["who"] == LIAR
    assert says in refused["reason"]
    assert record.on_clients["before"] == {
        "clients": len(ROWS) - 1, "rows": 2 * (len(ROWS) - 1), "row_mean": 0.5, "mean": 0.5,
        "worst_decile": 0.5, "worst": 0.5, "best": 0.5,
    }  # fmt: skip


def test_figures_that_nobody_asked_for_are_refused() -> None:
    record = play(lying(), rule=None)
    assert len(record.refused) == len(ROWS)
    assert "asks for no evaluation" in record.refused[0]["reason"]
    record = play(lying(), rule=replace(RULE, values="before"))
    assert "received alone" in record.refused[0]["reason"]


def test_a_model_without_finite_outputs_is_counted_and_not_averaged() -> None:
    record = play(lying(before=math.nan))
    assert not record.refused
    assert record.on_clients["before"]["not_finite"] == 1
    assert record.on_clients["before"]["mean"] == 0.5


def test_a_client_that_holds_nothing_out_is_averaged_like_any_other() -> None:
    record = play(lambda frame: frame)
    assert record.replies == len(ROWS)
    assert record.on_clients == {}
