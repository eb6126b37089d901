"""Nodes that forget: what is lost is sent again and counted, or done without, never made up."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from modelless import (
    CLIENTS,
    TWO_TIERS,
    FakeNode,
    Forgetful,
    Handler,
    make_plan,
    make_strategy,
    node_settings,
    start,
)
from safetensors.numpy import load, save
from wire_runs import ALL, CHANGES, FEEDBACK

from fedpet.client.global_values import frames_by_tier
from fedpet.client.state_store import StateStore
from fedpet.config import CodecConfig
from fedpet.protocol.request import read_request
from fedpet.server.client_records import ClientRecord, ClientRecords
from fedpet.utils.seeds import client_id64


def wiped(cache_of: Callable[[], Path], when: int) -> Callable[[Handler], Handler]:
    """A node whose disk and memory are lost before one of its messages."""

    def spoil(handler: Handler) -> Handler:
        count = itertools.count(1)
        node = [handler]

        def answer(payload: bytes) -> bytes:
            if next(count) == when:
                cache = cache_of()
                shutil.rmtree(cache / "state")
                node[0] = FakeNode(node_settings(cache)).answer
            return node[0](payload)

        return answer

    return spoil


def test_a_node_that_lost_the_reference_is_asked_again_and_nothing_changes(
    run: Any, tmp_path: Path
) -> None:
    expected, books, _ = run(CHANGES, rounds=4)
    last = tmp_path / "cache1"
    values, ledger, sizes = run(CHANGES, rounds=4, spoil=wiped(lambda: last, when=4))
    assert values.tobytes() == expected.tobytes()
    assert not any(record.refused for record in ledger.rounds)
    assert len(sizes) == 5  # of 4 rounds
    assert [r.downlink_bytes for r in ledger.rounds] == [r.downlink_bytes for r in books.rounds]


@pytest.mark.parametrize("codec", [FEEDBACK, ALL])
def test_a_node_that_names_its_own_tier_keeps_its_residuals_when_the_server_goes_on(
    codec: CodecConfig, tmp_path: Path
) -> None:
    def node(cache: str) -> dict[int, Handler]:
        settings = replace(node_settings(tmp_path / cache), max_density=0.005)
        return {1: FakeNode(settings).answer}

    everyone = {"clients_per_round": 8}
    straight = make_strategy(make_plan(codec, TWO_TIERS), **everyone)
    expected = start(straight, node("a"), 4)
    first = make_strategy(make_plan(codec, TWO_TIERS), **everyone)
    values = start(first, node("b"), 2)
    second = make_strategy(make_plan(codec, TWO_TIERS), **everyone)
    second.load_state(load(save(first.state())))
    second.requests.holders.load_records(first.requests.holders.all_records())
    second.rounds_done = 2
    assert start(second, node("b"), 2, values).tobytes() == expected.tobytes()


def test_who_has_not_come_back_yet_is_in_the_next_journal_all_the_same() -> None:
    holders = ClientRecords({"a": 1, "b": 2})
    holders.answered(5, "a", 0, 3)
    holders.accepted["a"] = 3
    later = ClientRecords({})  # a deployment that goes on: nobody is there yet
    later.load_records(holders.all_records())
    later.load_state(holders.state())
    assert later.run == holders.run
    assert later.all_records() == {"a": ClientRecord(accepted=3, reference=3)}


def test_a_device_that_lost_everything_is_sent_it_again_and_that_is_counted(
    tmp_path: Path,
) -> None:
    """With one client a node the books are what is on the wire, whatever is sent twice."""
    homes = {name: number for number, name in enumerate(CLIENTS, 1)}
    strategy = make_strategy(make_plan(CHANGES), homes=homes, clients_per_round=8)
    caches = {number: tmp_path / str(number) for number in homes.values()}
    handlers = {n: Forgetful(cache).answer for n, cache in caches.items()}
    honest, count = handlers[3], itertools.count(1)

    def wiping(payload: bytes) -> bytes:
        if next(count) == 3:
            shutil.rmtree(caches[3])
        return honest(payload)

    handlers[3] = wiping
    start(strategy, handlers, 4)
    records = strategy.ledger.rounds
    assert not any(record.refused for record in records)
    assert [record.messages for record in records] == [16, 16, 18, 16]
    # But for the ids in a message's metadata, which are shorter here than between machines.
    alone = [r.uplink_bytes + r.downlink_bytes + r.plan_bytes for r in records]
    apart = [(a - r.wire_bytes) / r.messages for a, r in zip(alone, records, strict=True)]
    assert apart == pytest.approx([apart[0]] * 4, abs=4)
    assert records[2].plan_bytes > 0


def test_a_client_whose_residual_is_lost_goes_on_without_it(run: Any, tmp_path: Path) -> None:
    everyone = {"clients_per_round": 8}
    last = tmp_path / "cache0"
    values, ledger, sizes = run(FEEDBACK, rounds=3, spoil=wiped(lambda: last, when=3), **everyone)
    assert not any(record.refused for record in ledger.rounds)
    assert len(sizes) == 4
    with_all, _, _ = run(FEEDBACK, rounds=3, **everyone)
    assert values.tobytes() != with_all.tobytes()  # something was lost, and is not made up


def test_a_client_whose_residual_the_disk_does_not_take_is_refused_and_the_others_are_not(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = StateStore.keep_residual

    def full(self: StateStore, client: int, *args: Any, **named: Any) -> None:
        if client == client_id64(CLIENTS[-1]):
            raise OSError(28, "No space left on device")
        honest(self, client, *args, **named)

    monkeypatch.setattr(StateStore, "keep_residual", full)
    _, ledger, _ = run(FEEDBACK, rounds=1, clients_per_round=8)
    [refused] = ledger.rounds[0].refused
    assert refused["who"] == CLIENTS[-1]
    assert "No space left" in refused["reason"]
    assert ledger.rounds[0].replies == 7


def test_a_node_that_is_never_content_is_refused_by_its_reason(run: Any) -> None:
    from fedpet.protocol.frame import Refusal, RefusalCode, pack_refusal

    def never(handler: Handler) -> Handler:
        def answer(payload: bytes) -> bytes:
            asked = read_request(payload)
            [*_, frame] = frames_by_tier(asked)[-1]
            code = RefusalCode.REFERENCE_MISSING
            return b"".join(
                pack_refusal(Refusal(frame.plan_digest, frame.server_round, n, "gone", code))
                for n in asked.clients
            )

        return answer

    _, ledger, sizes = run(CHANGES, rounds=1, spoil=never)
    assert len(sizes) == 4
    assert len(ledger.rounds[0].refused) == 5
    assert all("gone" in refused["reason"] for refused in ledger.rounds[0].refused)
