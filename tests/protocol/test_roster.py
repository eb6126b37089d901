"""A node's list of its clients, and whatever else may come in its place."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpet.errors import FrameError, ReplyError
from fedpet.protocol.frame import Frame, Refusal, pack_frame, pack_refusal
from fedpet.protocol.registration import decode_registration, encode_registration

names = st.text(st.characters(exclude_categories=["C"]), min_size=1, max_size=60).filter(str.strip)
rosters = st.dictionaries(names, st.integers(1, 2**32 - 1), min_size=1, max_size=20)


@given(rosters)
def test_a_roster_survives_its_bytes(num_rows: dict[str, int]) -> None:
    assert decode_registration(encode_registration(num_rows)) == num_rows


@given(rosters)
def test_the_order_in_which_clients_are_named_leaves_no_trace(num_rows: dict[str, int]) -> None:
    assert encode_registration(num_rows) == encode_registration(dict(reversed(num_rows.items())))


@given(rosters, st.data())
def test_a_roster_that_is_cut_short_or_goes_on_is_refused(
    num_rows: dict[str, int], data: st.DataObject
) -> None:
    packed = encode_registration(num_rows)
    cut = data.draw(st.integers(0, len(packed) - 1))
    with pytest.raises(ReplyError):
        decode_registration(packed[:cut])
    with pytest.raises(FrameError, match="ends after its clients"):
        decode_registration(packed + b"\0")


@given(st.binary(max_size=300))
def test_any_other_bytes_are_refused_and_never_raise_anything_else(payload: bytes) -> None:
    for one in (payload, b"FPRS\1\0\0\0" + payload):
        with contextlib.suppress(ReplyError):
            decode_registration(one)


def test_a_count_that_the_bytes_cannot_hold_allocates_nothing() -> None:
    with pytest.raises(FrameError, match="1 to 100000 clients, got 4294967295"):
        decode_registration(struct.pack("<4sB3xI", b"FPRS", 1, 2**32 - 1))


def entry(name: bytes, rows: int = 1) -> bytes:
    return struct.pack("<IH", rows, len(name)) + name


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([entry(b"a"), entry(b"a")], "each client once, got 'a' twice"),
        ([entry(b"a", 0)], "'a' has at least 1 row"),
        ([entry(b"")], "not blank"),
        ([entry(b" ")], "not blank"),
        ([entry(b"x" * 257)], "1 to 256 bytes"),
        ([entry(b"\xff\xfe")], "UTF-8"),
        ([entry(b"a\x1b[2Jb")], "no control characters"),
        ([entry("a\u202eb".encode())], "no control characters"),
        ([], "1 to 100000 clients, got 0"),
    ],
)
def test_a_roster_no_log_or_population_could_take_is_refused(
    entries: list[bytes], words: str
) -> None:
    with pytest.raises(FrameError, match=words):
        decode_registration(struct.pack("<4sB3xI", b"FPRS", 1, len(entries)) + b"".join(entries))


def test_a_roster_of_another_version_says_what_to_do() -> None:
    with pytest.raises(FrameError, match="run the same fedpet"):
        decode_registration(struct.pack("<4sB3xI", b"FPRS", 9, 1) + entry(b"a"))


def test_a_node_s_reason_for_having_no_roster_is_handed_on() -> None:
    with pytest.raises(ReplyError, match=r"^the file is empty\.$"):
        decode_registration(pack_refusal(Refusal(bytes(16), 0, 0, "the file is empty.")))


def test_values_in_the_roster_s_place_are_refused() -> None:
    frame = Frame(bytes(16), 1, 5, "float32", 0, 1, 0.0, 0.0, b"")
    with pytest.raises(ReplyError, match="neither a roster nor a refusal"):
        decode_registration(pack_frame(frame))
