"""Hostile bytes of the typed formats: refused in one sentence, and cheap to refuse (law 7)."""

from __future__ import annotations

import contextlib
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import fake_training
import msgspec
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from fedpet.config import MaskConfig, SearchConfig, TrainingConfig
from fedpet.errors import FedpetError, FrameError, PlanError, ReplyError
from fedpet.pet.structure import ModuleSpec, Structure
from fedpet.protocol.plan import Plan
from fedpet.protocol.registration import decode_registration, encode_registration
from fedpet.protocol.request import Path, Request, read_request, write_request

PLAN = fake_training.make_plan(
    mask=MaskConfig(density=0.02, tiers=("0.005=0.5", "0.02=0.5")),
    mask_positions=b"positions",
    structure=Structure((ModuleSpec("lora", "layer.0.query", rank=4, scale=2.0),)),
    training=TrainingConfig(learning_rates=("head=0.01",)),
    search=SearchConfig(budget="8kB"),
)
REQUEST = Request((1, 2**63), b"frame", b"plan", (1, 0), 3, (Path(7, 1), Path(0, 2)), (0, 9))
FORMATS: dict[str, tuple[bytes, Callable[[bytes], Any]]] = {
    "request": (write_request(REQUEST), read_request),
    "registration": (encode_registration({"a": 3, "client 2": 400}), decode_registration),
    "plan": (PLAN.to_bytes(), Plan.from_bytes),
}
EVERY = pytest.mark.parametrize("name", FORMATS)


def with_header(text: bytes) -> bytes:
    """A plan whose header is this text."""
    tag, _, mask = msgspec.msgpack.decode(PLAN.to_bytes())
    return msgspec.msgpack.encode([tag, zstandard.ZstdCompressor().compress(text), mask])


def header() -> dict[str, Any]:
    packed = msgspec.msgpack.decode(PLAN.to_bytes())[1]
    return msgspec.json.decode(zstandard.ZstdDecompressor().decompress(packed))  # type: ignore[no-any-return]


def test_a_plan_comes_back_as_it_was() -> None:
    assert Plan.from_bytes(PLAN.to_bytes()) == PLAN
    again = replace(PLAN, search=None, mask=None, mask_positions=b"", seed=2**70, head="keep")
    assert Plan.from_bytes(again.to_bytes()) == again


@EVERY
def test_another_version_is_refused_with_what_to_do(name: str) -> None:
    whole, read = FORMATS[name]
    tag = whole.index(b"FP")
    older = whole[:tag] + whole[tag : tag + 4] + b"1" + whole[tag + 5 :]
    with pytest.raises(ReplyError, match=f"the {name} does not read.*Run the same fedpet on"):
        read(older)


@EVERY
def test_a_missing_or_additional_field_is_refused(name: str) -> None:
    whole, read = FORMATS[name]
    fields = msgspec.msgpack.decode(whole)
    for changed in ([*fields, None], fields[:2] if name != "registration" else fields[:1], {}, []):
        with pytest.raises(ReplyError, match=f"the {name} does not read"):
            read(msgspec.msgpack.encode(changed))


@EVERY
def test_a_cut_or_longer_message_is_refused(name: str) -> None:
    whole, read = FORMATS[name]
    for damaged in (*(whole[:end] for end in range(len(whole))), whole + b"\0"):
        with pytest.raises(ReplyError):
            read(damaged)


BOMBS = {
    "an array of 4 billion": b"\xdd\xff\xff\xff\xff",
    "a map of 4 billion": b"\xdf\xff\xff\xff\xff",
    "bytes of 4 billion": b"\xc6\xff\xff\xff\xff",
    "text of 4 billion": b"\xdb\xff\xff\xff\xff",
    "a million arrays": b"\xdd\x00\x0f\x42\x40",
    "depth": b"\x91" * 100_000,
}


@EVERY
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_length_that_the_bytes_do_not_hold_and_depth_cost_no_memory(name: str, bomb: str) -> None:
    whole, read = FORMATS[name]
    start = whole.index(b"FP") + 5  # behind the format's name
    tracemalloc.start()
    try:
        for damaged in (whole[:start] + BOMBS[bomb], BOMBS[bomb], whole[:start] + b"\x90" * 9):
            tracemalloc.reset_peak()
            with pytest.raises(ReplyError):
                read(damaged)
            # A list of a million is allowed, and may be made before it is found to be short.
            assert tracemalloc.get_traced_memory()[1] < 9_000_000
    finally:
        tracemalloc.stop()


@EVERY
@given(data=st.data())
def test_no_drawn_damage_raises_anything_but_a_refusal(name: str, data: st.DataObject) -> None:
    whole, read = FORMATS[name]
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        wild = data.draw(st.sampled_from([b"\xc0", b"\xc6", b"\xdd", b"\xff" * 4]) | st.binary())
        cut = data.draw(st.integers(0, 4))
        damaged[at : at + cut] = wild
        damaged = damaged or bytearray(b"\0")
    with contextlib.suppress(ReplyError):
        assert read(bytes(damaged)) is not None


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@given(value=values, data=st.data())
def test_a_plan_with_another_value_anywhere_is_refused_or_another_plan(
    value: Any, data: st.DataObject
) -> None:
    fields = header()
    table = fields
    key = data.draw(st.sampled_from(sorted(table)))
    while isinstance(table[key], dict) and table[key] and data.draw(st.booleans()):
        table = table[key]
        key = data.draw(st.sampled_from(sorted(table)))
    table[key] = value
    try:
        parsed = Plan.from_bytes(with_header(msgspec.json.encode(fields)))
    except PlanError:
        return
    assert Plan.from_bytes(parsed.to_bytes()) == parsed


@pytest.mark.parametrize("where", [(), ("codec",), ("training",), ("mask",), ("structure",)])
def test_an_unknown_key_of_a_plan_is_refused_wherever_it_stands(where: tuple[str, ...]) -> None:
    fields = header()
    table = fields
    for key in where:
        table = table[key]
    table["surprise"] = 1
    with pytest.raises(PlanError, match="holds more, or less"):
        Plan.from_bytes(with_header(msgspec.json.encode(fields)))


def test_a_plan_that_leaves_a_setting_to_its_reader_is_refused() -> None:
    for table, key in [("training", "dropout"), ("codec", "downlink"), ("structure", "gates")]:
        fields = header()
        del fields[table][key]
        with pytest.raises(PlanError, match="holds more, or less"):
            Plan.from_bytes(with_header(msgspec.json.encode(fields)))


def test_a_value_that_the_config_refuses_is_refused_in_a_plan() -> None:
    for table, key, value, words in [
        ("training", "batch_size", 0, "training.batch-size must be at least 1"),
        ("codec", "downlink_mode", "sideways", "codec.downlink-mode"),
        ("training", "dropout", "yes", "Expected `bool`"),
    ]:
        fields = header()
        fields[table][key] = value
        with pytest.raises(PlanError, match=words):
            Plan.from_bytes(with_header(msgspec.json.encode(fields)))


def test_a_header_that_unpacks_beyond_its_bound_is_refused_unread() -> None:
    tag, _, mask = msgspec.msgpack.decode(PLAN.to_bytes())
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 25))
    tracemalloc.start()
    try:
        with pytest.raises(PlanError, match="header has at most 16777216 bytes"):
            Plan.from_bytes(msgspec.msgpack.encode([tag, bomb, mask]))
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"clients": (-1,)}, ">= 0"),
        ({"clients": (2**63,), "which": (16,)}, "<= 15"),
        ({"clients": (1, 2), "which": (0,)}, "'which' of none or of each, got 1"),
        ({"clients": (1,), "accepted": (2**32,)}, "<= 4294967295"),
        ({"clients": (1, 2), "accepted": (1, 2, 3)}, "'accepted' of none or of each, got 3"),
        ({"clients": (1,), "paths": ((65536, 0),)}, "<= 65535"),
        ({"clients": (1,), "paths": ((1, 0),) * 17}, "length <= 16"),
        ({"clients": ("1",)}, "Expected `int`, got `str`"),
        ({"clients": (1.5,)}, "Expected `int`, got `float`"),
    ],
)
def test_a_request_out_of_its_ranges_is_refused(fields: dict[str, Any], words: str) -> None:
    whole = {"frame": b"", "plan": b"", "which": (), "run": 0, "paths": (), "accepted": ()} | fields
    order = ("clients", "frame", "plan", "which", "run", "paths", "accepted")
    packed = msgspec.msgpack.encode(["FPRQ2", *(whole[key] for key in order)])
    with pytest.raises(FrameError, match=words):
        read_request(packed)


def test_every_error_of_a_format_is_one_of_fedpets(  # a node answers those, and no others
) -> None:
    for _, read in FORMATS.values():
        for payload in (b"", b"\0", b"\xc1", b"FP", b"\x92\xa5FPRS2\xdd\xff\xff\xff\xff"):
            with pytest.raises(FedpetError):
                read(payload)
