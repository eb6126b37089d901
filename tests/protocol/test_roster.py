"""A node's list of its clients, and whatever else may come in its place."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import msgspec
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
    versions = {"fedpet": "0.1.0 0123", "torch": "2.13.0"}
    read = decode_registration(encode_registration(num_rows, versions))
    assert (read.num_rows, read.versions) == (num_rows, versions)


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
    with pytest.raises(FrameError, match=r"does not read.*trailing"):
        decode_registration(packed + b"\0")


@given(st.binary(max_size=300))
def test_any_other_bytes_are_refused_and_never_raise_anything_else(payload: bytes) -> None:
    for one in (payload, b"\x93\xa5FPRS3" + payload, b"FP" + payload):
        with contextlib.suppress(ReplyError):
            decode_registration(one)


def forged(entries: Sequence[tuple[object, object]], tag: str = "FPRS3") -> bytes:
    return msgspec.msgpack.encode([tag, entries, []])


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([("a", 1), ("a", 1)], "each client once, got 'a' twice"),
        ([("a", 0)], ">= 1"),
        ([("a", 2**32)], "<= 4294967295"),
        ([("a", True)], "Expected `int`, got `bool`"),
        ([(b"a", 1)], "Expected `str`, got `bytes`"),
        ([("a", 1, 1)], "length 2"),
        ([("", 1)], "length >= 1"),
        ([(" ", 1)], "not blank"),
        ([("x" * 257, 1)], "length <= 256"),
        ([("ü" * 129, 1)], "1 to 256 bytes"),
        ([("a\x1b[2Jb", 1)], "no control characters"),
        ([("a\u202eb", 1)], "no control characters"),
        ([], "length >= 1"),
        ([("a", 1)] * 100_001, "length <= 100000"),
    ],
)
def test_a_roster_no_log_or_population_could_take_is_refused(
    entries: list[tuple[object, object]], words: str
) -> None:
    with pytest.raises(FrameError, match=words):
        decode_registration(forged(entries))


def test_a_name_that_is_no_utf_8_is_refused_when_read_and_when_written() -> None:
    with pytest.raises(FrameError, match="does not read"):
        decode_registration(b"\x93\xa5FPRS3\x91\x92\xa2\xff\xfe\x01\x90")
    with pytest.raises(FrameError, match="UTF-8"):
        encode_registration({"a\ud800": 1})


def test_a_roster_of_another_version_says_what_to_do() -> None:
    with pytest.raises(FrameError, match=r"Run the same fedpet"):
        decode_registration(forged([("a", 1)], tag="FPRS9"))


def test_a_node_s_reason_for_having_no_roster_is_handed_on() -> None:
    with pytest.raises(ReplyError, match=r"^the file is empty\.$"):
        decode_registration(pack_refusal(Refusal(bytes(16), 0, 0, "the file is empty.")))


def test_values_in_the_roster_s_place_are_refused() -> None:
    frame = Frame(bytes(16), 1, 5, "float32", 0, 1, 0.0, 0.0, b"")
    with pytest.raises(ReplyError, match="neither a registration nor a refusal"):
        decode_registration(pack_frame(frame))
