"""The wire over whole runs: law 6, what is counted, and a head's codec of its own."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from modelless import (
    CLIENTS,
    NUMBERS,
    TWO_TIERS,
    FakeNode,
    Handler,
    make_plan,
    make_strategy,
    node_settings,
    start,
)
from safetensors.numpy import load, save
from sending import codec_of
from wire_runs import ALL, CHANGES, FEEDBACK, VALUES, VALUES_FEEDBACK

from fedpet.client.global_values import frames_by_tier
from fedpet.config import CodecConfig, MaskConfig
from fedpet.protocol.frame import pack_frame
from fedpet.protocol.plan import Plan
from fedpet.protocol.request import (
    SOME_CLIENT,
    Request,
    read_request,
    single_client_bytes,
    write_request,
)
from fedpet.protocol.request import Path as WirePath

# -- law 6: the result hangs on nothing but the seed -----------------------------------------


@pytest.mark.parametrize("codec", [CHANGES, FEEDBACK, ALL, VALUES, VALUES_FEEDBACK])
@pytest.mark.parametrize("mask", [None, TWO_TIERS])
def test_the_spread_over_nodes_and_processes_changes_neither_values_nor_books(
    run: Any, codec: CodecConfig, mask: MaskConfig | None
) -> None:
    def alone(ledger: Any) -> list[tuple[int, ...]]:
        return [
            (r.uplink_bytes, r.downlink_bytes, r.plan_bytes, r.newcomers) for r in ledger.rounds
        ]

    values, ledger, _ = run(codec, mask=mask)
    assert values.any()
    assert not any(record.refused for record in ledger.rounds)
    for nodes, forgetful in ((3, False), (8, False), (2, True)):
        others, books, _ = run(codec, nodes=nodes, forgetful=forgetful, mask=mask)
        assert others.tobytes() == values.tobytes()
        assert alone(books) == alone(ledger)


def test_a_second_run_of_one_plan_finds_nothing_of_the_first(tmp_path: Path) -> None:
    results = []
    for _ in range(2):  # of one cache, which the first leaves full
        node = FakeNode(node_settings(tmp_path))
        results.append(start(make_strategy(make_plan(ALL)), {1: node.answer}, 4))
    assert results[0].tobytes() == results[1].tobytes()
    assert len(list((tmp_path / "state").glob("*/*"))) == 2


@pytest.mark.parametrize("codec", [CHANGES, FEEDBACK, ALL, VALUES, VALUES_FEEDBACK])
def test_a_run_that_stops_and_goes_on_is_the_run_that_did_not_stop(
    codec: CodecConfig, tmp_path: Path
) -> None:
    straight = make_strategy(make_plan(codec, TWO_TIERS))
    expected = start(straight, {1: FakeNode(node_settings(tmp_path / "a")).answer}, 7)

    def node() -> dict[int, Handler]:
        return {1: FakeNode(node_settings(tmp_path / "b")).answer}

    first = make_strategy(make_plan(codec, TWO_TIERS))
    values = start(first, node(), 3)
    journal = load(save(first.state()))  # as the journal keeps them
    records = first.requests.holders.all_records()
    first.rounds_done = 3
    start(first, node(), 1, values)  # the crash comes in a round of which the journal knows nothing
    second = make_strategy(make_plan(codec, TWO_TIERS))
    second.load_state(journal)
    second.requests.holders.load_records(records)
    second.rounds_done = 3
    assert start(second, node(), 4, values).tobytes() == expected.tobytes()
    books = [record.downlink_bytes for record in second.ledger.rounds]
    assert books == [record.downlink_bytes for record in straight.ledger.rounds][-4:]


# -- the books -------------------------------------------------------------------------------


def test_a_client_that_was_there_last_round_is_counted_with_one_change_and_others_with_more(
    tmp_path: Path,
) -> None:
    """Against the frames themselves: a client alone, sent what it missed, whatever its node got."""
    plan = make_plan(CHANGES)
    strategy = make_strategy(plan)
    seen: list[tuple[Request, list[str]]] = []
    node = FakeNode(node_settings(tmp_path))

    def answer(payload: bytes) -> bytes:
        asked = read_request(payload)
        seen.append((asked, [NUMBERS[number] for number in asked.clients]))
        return node.answer(payload)

    start(strategy, {1: answer}, 6)
    held = dict.fromkeys(CLIENTS, 0)
    changes: list[bytes] = []
    for server_round, (record, (asked, names)) in enumerate(
        zip(strategy.ledger.rounds, seen, strict=True), start=1
    ):
        [frames] = frames_by_tier(asked)
        assert len(frames) == 1  # the node itself was there each time
        assert asked.paths[0].changes == 1
        changes.append(pack_frame(frames[0]))
        expected = 0
        for name in names:
            missed = b"".join(changes[held[name] :])
            path = WirePath(server_round - held[name], asked.paths[0].checksum)
            alone = write_request(Request((SOME_CLIENT,), missed, run=asked.run, paths=(path,)))
            expected += single_client_bytes(len(alone), reply=False)
            held[name] = server_round
        assert record.downlink_bytes <= expected
        if server_round < 4:  # later, some are sent the reference itself
            assert record.downlink_bytes == expected


def test_with_one_client_a_node_the_bytes_are_those_on_the_wire(run: Any) -> None:
    """But for the ids in a message's metadata, which are shorter here than between machines."""
    homes = {name: number for number, name in enumerate(CLIENTS, start=1)}
    apart = []
    for codec in (codec_of(), CHANGES, ALL):
        _, ledger, _ = run(codec, nodes=8, homes=homes)
        record = [ledger.total(f"{part}_bytes") for part in ("uplink", "downlink", "plan")]
        apart.append(sum(record) - ledger.total("wire_bytes"))
    assert apart[1] == pytest.approx(apart[0], abs=120)  # a byte or two a message
    assert apart[2] == pytest.approx(apart[0], abs=120)


def test_changes_cost_what_their_codec_does_where_everyone_is_there_each_time(run: Any) -> None:
    everyone = {"clients_per_round": 8, "rounds": 8}
    _, changes, _ = run(codec_of(downlink="eden-2"), **everyone)
    _, values, _ = run(codec_of(downlink="eden-2", downlink_mode="full"), **everyone)
    _, plain, _ = run(codec_of(), **everyone)
    down = [ledger.total("downlink_bytes") for ledger in (changes, values, plain)]
    assert down[0] < 1.05 * down[1] < down[2]


# -- the head's codec ------------------------------------------------------------------------


def test_a_plan_names_every_key_of_its_codec() -> None:
    for codec_ in (CHANGES, FEEDBACK, ALL, codec_of(downlink="int8", downlink_mode="full")):
        again = Plan.from_bytes(make_plan(codec_).to_bytes())
        assert asdict(again.codec) == asdict(codec_)


def test_a_head_sent_without_loss_comes_without_loss(run: Any) -> None:
    rounds = {"clients_per_round": 8, "rounds": 3}
    exact, _, _ = run(codec_of(), **rounds)
    mixed, _, _ = run(codec_of(uplink="eden-1", head_uplink="float32"), **rounds)
    assert mixed[360:].tobytes() == exact[360:].tobytes()
    assert (mixed[:360] != exact[:360]).mean() > 0.9
