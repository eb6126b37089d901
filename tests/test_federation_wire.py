"""The wire over whole runs: changes of a reference, error feedback, a codec of the head's own."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from modelless import (
    CLIENTS,
    NUM_VALUES,
    NUMBERS,
    ROWS,
    SEED,
    TWO_TIERS,
    FakeNode,
    FakePet,
    Forgetful,
    Handler,
    make_plan,
    make_strategy,
    node_settings,
    start,
    training_by_formula,
)
from safetensors.numpy import load, save

from fedpet.codec import check_codecs
from fedpet.codec.frame import Frame, pack_frame, unpack_frames
from fedpet.config import CodecConfig, MaskConfig
from fedpet.errors import ConfigError, FrameError
from fedpet.messages import Path as WirePath
from fedpet.messages import Request, read_request, solo_bytes, write_request
from fedpet.node_state import NodeState
from fedpet.plan import Plan
from fedpet.seeds import client_number, derive_seed
from fedpet.starts import frames_of
from fedpet.strategies.holders import Holders

__all__ = ["training_by_formula"]
pytestmark = pytest.mark.usefixtures("training_by_formula")

CHANGES = CodecConfig(up="eden-4", down="eden-3")
FEEDBACK = CodecConfig(up="topk-0.1+eden-4", error_feedback=True)
ALL = CodecConfig(
    up="topk-0.1+eden-4", head_up="int8", down="eden-2", head_down="int4", error_feedback=True
)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., tuple[np.ndarray, Any, list[int]]]:
    """Run rounds on nodes of one machine; gives the values, the books and the sizes of requests."""
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
        cache = tmp_path / f"cache{next(counter)}"
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


# -- law 6: the result hangs on nothing but the seed -----------------------------------------


@pytest.mark.parametrize("codec", [CHANGES, FEEDBACK, ALL])
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


@pytest.mark.parametrize("codec", [CHANGES, FEEDBACK, ALL])
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
    first.rounds_done = 3
    start(first, node(), 1, values)  # the crash comes in a round of which the journal knows nothing
    second = make_strategy(make_plan(codec, TWO_TIERS))
    second.load_state(journal)
    second.rounds_done = 3
    assert start(second, node(), 4, values).tobytes() == expected.tobytes()
    books = [record.downlink_bytes for record in second.ledger.rounds]
    assert books == [record.downlink_bytes for record in straight.ledger.rounds][-4:]


# -- nodes that forget -----------------------------------------------------------------------


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
    second.rounds_done = 2
    assert start(second, node("b"), 2, values).tobytes() == expected.tobytes()


def test_who_has_not_come_back_yet_is_in_the_next_journal_all_the_same() -> None:
    holders = Holders({"a": 1, "b": 2})
    holders.answered(5, "a", 0, 3)
    holders.accepted["a"] = 3
    later = Holders({})  # a deployment that goes on: nobody is there yet
    later.load_state(holders.state())
    assert {k: v.tolist() for k, v in later.state().items()} == {
        k: v.tolist() for k, v in holders.state().items() if k != "names"
    } | {"names": list(b'["a"]'), "accepted": [3], "held": [[0, 3]]}


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
    honest = NodeState.keep_residual

    def full(self: NodeState, client: int, *args: Any, **named: Any) -> None:
        if client == client_number(CLIENTS[-1]):
            raise OSError(28, "No space left on device")
        honest(self, client, *args, **named)

    monkeypatch.setattr(NodeState, "keep_residual", full)
    _, ledger, _ = run(FEEDBACK, rounds=1, clients_per_round=8)
    [refused] = ledger.rounds[0].refused
    assert refused["who"] == CLIENTS[-1]
    assert "No space left" in refused["reason"]
    assert ledger.rounds[0].replies == 7


def test_a_node_that_is_never_content_is_refused_by_its_reason(run: Any) -> None:
    from fedpet.codec.frame import Refusal, pack_refusal
    from fedpet.messages import REFERENCE_MISSING

    def never(handler: Handler) -> Handler:
        def answer(payload: bytes) -> bytes:
            asked = read_request(payload)
            [*_, frame] = frames_of(asked)[-1]
            return b"".join(
                pack_refusal(Refusal(frame.plan_digest, frame.server_round, n, REFERENCE_MISSING))
                for n in asked.clients
            )

        return answer

    _, ledger, sizes = run(CHANGES, rounds=1, spoil=never)
    assert len(sizes) == 4
    assert len(ledger.rounds[0].refused) == 5
    assert all(REFERENCE_MISSING in refused["reason"] for refused in ledger.rounds[0].refused)


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
        [frames] = frames_of(asked)
        assert len(frames) == 1  # the node itself was there each time
        assert asked.paths[0].changes == 1
        changes.append(pack_frame(frames[0]))
        expected = 0
        for name in names:
            missed = b"".join(changes[held[name] :])
            path = WirePath(server_round - held[name], 0)
            alone = write_request(Request((1,), missed, run=1, paths=(path,)))
            expected += solo_bytes(alone, reply=False)
            held[name] = server_round
        assert record.downlink_bytes <= expected
        if server_round < 4:  # later, some are sent the reference itself
            assert record.downlink_bytes == expected


def test_with_one_client_a_node_the_bytes_are_those_on_the_wire(run: Any) -> None:
    """But for the ids in a message's metadata, which are shorter here than between machines."""
    homes = {name: number for number, name in enumerate(CLIENTS, start=1)}
    apart = []
    for codec in (CodecConfig(), CHANGES, ALL):
        _, ledger, _ = run(codec, nodes=8, homes=homes)
        record = [ledger.total(f"{part}_bytes") for part in ("uplink", "downlink", "plan")]
        apart.append(sum(record) - ledger.total("wire_bytes"))
    assert apart[1] == pytest.approx(apart[0], abs=120)  # a byte or two a message
    assert apart[2] == pytest.approx(apart[0], abs=120)


def test_changes_cost_what_their_codec_does_where_everyone_is_there_each_time(run: Any) -> None:
    everyone = {"clients_per_round": 8, "rounds": 8}
    _, changes, _ = run(CodecConfig(down="eden-2"), **everyone)
    _, values, _ = run(CodecConfig(down="eden-2", downlink="values"), **everyone)
    _, plain, _ = run(CodecConfig(), **everyone)
    down = [ledger.total("downlink_bytes") for ledger in (changes, values, plain)]
    assert down[0] < 1.05 * down[1] < down[2]


# -- error feedback --------------------------------------------------------------------------


def test_error_feedback_is_that_of_a_plain_simulation_also_when_a_round_is_not_accepted(
    tmp_path: Path,
) -> None:
    """Numpy alone: residuals in a dict, a round below its quorum and a frame lost on its way."""
    plan = make_plan(FEEDBACK)
    coding = plan.uplink([(0, 320), (320, 360), (360, 420)], [(360, 420)])
    node = FakeNode(node_settings(tmp_path))
    lost = {2: set(CLIENTS[:6]), 4: {CLIENTS[1]}}  # the 2nd round misses its quorum

    def lossy(payload: bytes) -> bytes:
        whole = node.answer(payload)
        frames = list(unpack_frames(whole, max_frames=9, max_payload_bytes=1 << 20))
        kept = [f for f in frames if NUMBERS[f.client] not in lost.get(f.server_round, ())]
        return b"".join(pack_frame(frame) for frame in kept if isinstance(frame, Frame))

    strategy = make_strategy(plan, clients_per_round=8)
    values = start(strategy, {1: lossy}, 6)
    expected = np.zeros(NUM_VALUES, dtype=np.float32)
    residuals: dict[str, np.ndarray] = {}
    pet = FakePet(plan)
    for server_round in range(1, 7):
        left, total, weight = {}, np.zeros(NUM_VALUES), 0
        for name in CLIENTS:
            number = client_number(name)
            seed = derive_seed("client", SEED, server_round, number)
            pet.load_values(torch.from_numpy(expected), seed=seed)
            pet.train(number, seed)
            wanted = pet.values().numpy() - expected
            if name in residuals:
                wanted = wanted + residuals[name]
            encode_seed = derive_seed("encode", seed)
            decoded = coding.decode(coding.encode(wanted, seed=encode_seed), seed=encode_seed)
            if name in lost.get(server_round, ()):
                continue
            left[name] = wanted - decoded
            total += ROWS[name] * decoded.astype(np.float64)
            weight += ROWS[name]
        if server_round != 2:
            residuals |= left
            expected = (expected.astype(np.float64) + total / weight).astype(np.float32)
    assert values.tobytes() == expected.tobytes()
    assert not strategy.ledger.rounds[1].aggregated


def test_with_error_feedback_top_k_comes_nearer_to_what_was_meant(run: Any) -> None:
    everyone = {"clients_per_round": 8, "rounds": 30}
    meant, _, _ = run(CodecConfig(), **everyone)
    fed, _, _ = run(FEEDBACK, **everyone)
    bare, _, _ = run(CodecConfig(up="topk-0.1+eden-4"), **everyone)
    assert np.linalg.norm(fed - meant) < 0.7 * np.linalg.norm(bare - meant)


def test_nothing_of_the_clients_state_is_in_messages_but_four_bytes_a_client(run: Any) -> None:
    _, _, fed = run(FEEDBACK, rounds=4)
    _, _, bare = run(CodecConfig(up="topk-0.1+eden-4"), rounds=4)
    # 8 for the run, 4 a client; the plan says so in the first, and is let out of account.
    assert [a - b for a, b in zip(fed[1:], bare[1:], strict=True)] != [0, 0, 0]
    for one, other in zip(fed[1:], bare[1:], strict=True):
        assert abs(one - other - 8 - 4 * 5) < 200  # the values differ, and with them their length


# -- the head's codec ------------------------------------------------------------------------


def test_a_plan_without_the_new_keys_is_the_plan_it_was() -> None:
    plan = make_plan(CodecConfig(up="int8"))
    import json

    import zstandard

    header = plan.to_bytes()[16:]
    codec = json.loads(zstandard.ZstdDecompressor().decompress(header))["codec"]
    assert codec == {"up": "int8", "down": "float32"}
    for codec_ in (CHANGES, FEEDBACK, ALL, CodecConfig(down="int8", downlink="values")):
        again = Plan.from_bytes(make_plan(codec_).to_bytes())
        assert asdict(again.codec) == asdict(codec_)


def test_a_head_sent_without_loss_comes_without_loss(run: Any) -> None:
    rounds = {"clients_per_round": 8, "rounds": 3}
    exact, _, _ = run(CodecConfig(), **rounds)
    mixed, _, _ = run(CodecConfig(up="eden-1", head_up="float32"), **rounds)
    assert mixed[360:].tobytes() == exact[360:].tobytes()
    assert (mixed[:360] != exact[:360]).mean() > 0.9


@pytest.mark.parametrize(
    ("codec", "words"),
    [
        (CodecConfig(head_up="int7"), "unknown codec 'int7'"),
        (CodecConfig(head_down="eden-9"), "unknown codec 'eden-9'"),
        (CodecConfig(error_feedback=True), "loses nothing"),
    ],
)
def test_codecs_that_do_not_go_together_are_refused(codec: CodecConfig, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_codecs(codec)
    check_codecs(CodecConfig(head_up="int4", error_feedback=True))


def test_an_unknown_downlink_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="changes, values"):
        CodecConfig(downlink="everything")


# -- the request -----------------------------------------------------------------------------

REQUESTS = [
    Request((1, 2), b"frame"),
    Request((1, 2), b"frame", b"plan", (0, 1)),
    Request((1, 2**64 - 1), b"frame", run=2**64 - 1, paths=(WirePath(0, 2**32 - 1),)),
    Request((1, 2), b"frame", b"plan", (1, 0), 3, (WirePath(7, 1), WirePath(0, 2)), (0, 9)),
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


def test_a_request_of_the_first_kind_takes_the_bytes_it_took() -> None:
    packed = write_request(Request((1,), b"frame", b"plan"))
    assert packed == b"FPRQ\1\0\0\0" + b"".join(n.to_bytes(4, "little") for n in (1, 4, 5)) + (
        b"\1" + b"\0" * 7 + b"planframe"
    )


def test_a_request_that_names_a_round_to_come_is_refused(tmp_path: Path) -> None:
    node = FakeNode(node_settings(tmp_path))
    changed = []

    def forward(payload: bytes) -> bytes:
        from dataclasses import replace

        asked = read_request(payload)
        changed.append(write_request(replace(asked, accepted=(9,) * len(asked.clients))))
        return node.answer(changed[-1])

    strategy = make_strategy(make_plan(FEEDBACK))
    start(strategy, {1: forward}, 1)
    assert all("must be before this one" in r["reason"] for r in strategy.ledger.rounds[0].refused)
    assert len(strategy.ledger.rounds[0].refused) == 5
