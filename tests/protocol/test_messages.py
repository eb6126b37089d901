"""Requests between server and node: whole or refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpet.errors import FrameError
from fedpet.protocol.request import (
    Path,
    Request,
    from_record,
    read_request,
    to_record,
    write_request,
)

numbers = st.integers(1, 2**64 - 1)
requests = st.builds(
    lambda clients, mixed, frame, plan: Request(
        tuple(clients), frame, plan, tuple(n % 3 for n in clients) if mixed else ()
    ),
    st.lists(numbers, min_size=1, max_size=5),
    st.booleans(),
    st.binary(max_size=20),
    st.binary(max_size=20),
)


@given(requests)
def test_a_request_survives_its_bytes(request_: Request) -> None:
    assert read_request(write_request(request_)) == request_


@given(st.lists(numbers, min_size=1, max_size=5), st.binary(max_size=20))
def test_naming_the_frame_of_each_client_costs_a_byte_a_client_and_else_nothing(
    clients: list[int], frame: bytes
) -> None:
    one = len(write_request(Request(tuple(clients), frame)))
    assert one <= 16 + 9 * len(clients) + len(frame)
    mixed = Request(tuple(clients), frame, b"", (0,) * len(clients))
    assert len(write_request(mixed)) == one + len(clients)


@given(requests, st.data())
def test_a_request_that_was_cut_or_grew_is_refused(request_: Request, data: st.DataObject) -> None:
    whole = write_request(request_)
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    for damaged in (cut, whole + b"\0"):
        with pytest.raises(FrameError, match="the request does not read"):
            read_request(damaged)


REQUESTS = [
    Request((1, 2), b"frame"),
    Request((1, 2), b"frame", b"plan", (0, 1)),
    Request((1, 2**64 - 1), b"frame", run=2**64 - 1, paths=(Path(0, 2**32 - 1),)),
    Request((1, 2), b"frame", b"plan", (1, 0), 3, (Path(7, 1), Path(0, 2)), (0, 9)),
    Request((5,), b"", run=3, accepted=(2**32 - 1,)),
]


@pytest.mark.parametrize("request_", REQUESTS)
def test_a_request_comes_back_as_it_was_and_no_cut_one_does(request_: Request) -> None:
    packed = write_request(request_)
    assert read_request(packed) == request_
    for end in range(len(packed)):
        with pytest.raises(FrameError):
            read_request(packed[:end])
    with pytest.raises(FrameError):
        read_request(packed + b"\0")


def test_a_request_survives_its_bytes_and_its_record() -> None:
    record = to_record(b"some bytes")
    assert from_record(record) == b"some bytes"
