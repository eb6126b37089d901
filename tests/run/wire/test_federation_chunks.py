"""Clients go to nodes in chunks: nothing comes out otherwise, and little is held at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Error, Message
from modelless import (
    CLIENTS,
    NUM_VALUES,
    TWO_TIERS,
    FakeNode,
    Handler,
    make_plan,
    make_strategy,
    node_settings,
)
from sending import codec_of
from wire_runs import ALL, CHANGES, FEEDBACK, VALUES

from fedpet.client.global_values import frames_by_tier
from fedpet.config import CodecConfig, MaskConfig
from fedpet.protocol.frame import Refusal, RefusalCode, pack_refusal, unpack_frames
from fedpet.protocol.request import flower_bytes, from_record, read_request
from fedpet.run.local_grid import LocalGrid
from fedpet.server import schedule as schedule_module
from fedpet.server.aggregation import Fold, from_arrays, to_arrays
from fedpet.server.replies import Replies
from fedpet.server.rounds import SparseStrategy

EVERYONE = {"clients_per_round": 8, "quorum": 0.1}
RULES: tuple[dict[str, Any], ...] = (
    {"name": "fedavg"},
    {"name": "fedadam"},
    {"name": "fedmedian"},
    {"name": "qfedavg", "client_learning_rate": 1e-3},
)


class Delayed(LocalGrid):
    """Gives one reply a pull: the newest of those that are awaited, so the first comes last."""

    def __init__(self, handlers: dict[int, Handler]) -> None:
        super().__init__(handlers)
        self.most_out = 0
        self.messages: list[Message] = []
        self.weight = 0

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        self.weight += sum(map(flower_bytes, messages))
        numbers = list(super().push_messages(messages))
        self.most_out = max(self.most_out, len(self._replies))
        return numbers

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        replies = list(super().pull_messages([*message_ids][-1:]))
        self.weight += sum(map(flower_bytes, replies))
        return replies


@pytest.fixture
def chunks_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how many clients a chunk has."""

    def set_most(clients: int) -> None:
        monkeypatch.setattr(schedule_module, "MOST", clients)
        monkeypatch.setattr("fedpet.server.reply_stream.SHORTEST_PAUSE", 0.0)

    return set_most


def nodes_of(folder: Path, count: int) -> dict[int, Handler]:
    """Workers of one machine, which share a cache."""
    return {n + 1: FakeNode(node_settings(folder)).answer for n in range(count)}


def play(
    strategy: SparseStrategy,
    handlers: dict[int, Handler],
    rounds: int = 3,
    grid: type[LocalGrid] = Delayed,
    timeout: float = 60.0,
) -> tuple[np.ndarray, Any]:
    made = grid(handlers)
    start = to_arrays(np.zeros(NUM_VALUES, dtype=np.float32))
    result = strategy.start(made, start, num_rounds=rounds, timeout=timeout)
    return from_arrays(result.arrays if result.arrays else start), made


def alone(strategy: SparseStrategy) -> list[tuple[int, ...]]:
    rounds = strategy.ledger.rounds
    return [(r.uplink_bytes, r.downlink_bytes, r.plan_bytes, r.replies) for r in rounds]


# -- law 6 -----------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [CHANGES, FEEDBACK, ALL, VALUES])
@pytest.mark.parametrize("mask", [None, TWO_TIERS])
def test_chunks_change_neither_values_nor_the_books_of_clients(
    codec: CodecConfig,
    mask: MaskConfig | None,
    tmp_path: Path,
    chunks_of: Callable[[int], None],
) -> None:
    whole = make_strategy(make_plan(codec, mask), **EVERYONE)
    expected, _ = play(whole, nodes_of(tmp_path / "whole", 1))
    assert expected.any()
    for most, nodes in ((1, 3), (2, 1), (3, 2)):
        chunks_of(most)
        cut = make_strategy(make_plan(codec, mask), **EVERYONE)
        values, _ = play(cut, nodes_of(tmp_path / f"{most}", nodes))
        assert values.tobytes() == expected.tobytes()
        assert alone(cut) == alone(whole)
        assert not any(record.refused for record in cut.ledger.rounds)
        assert cut.ledger.current.messages > whole.ledger.current.messages


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_given_the_same_updates_in_the_same_order(
    rule: dict[str, Any], tmp_path: Path, chunks_of: Callable[[int], None]
) -> None:
    expected, _ = play(
        make_strategy(make_plan(VALUES), **EVERYONE, **rule), nodes_of(tmp_path / "whole", 2)
    )
    chunks_of(1)
    cut = make_strategy(make_plan(VALUES), **EVERYONE, **rule)
    values, _ = play(cut, nodes_of(tmp_path / "cut", 3))
    assert values.tobytes() == expected.tobytes()


def test_clients_that_live_on_a_node_stay_there_whatever_the_chunks(
    tmp_path: Path, chunks_of: Callable[[int], None]
) -> None:
    homes = {name: 1 + number % 2 for number, name in enumerate(CLIENTS)}
    results = []
    for most in (8, 3, 1):
        chunks_of(most)
        strategy = make_strategy(make_plan(CHANGES), homes=homes, **EVERYONE)
        results.append(play(strategy, nodes_of(tmp_path / str(most), 2))[0].tobytes())
        assert strategy.requests.homes == homes
    assert len({*results}) == 1


# -- what is held ----------------------------------------------------------------------------


def test_a_node_has_two_chunks_at_most_and_one_until_it_has_the_plan(
    tmp_path: Path, chunks_of: Callable[[int], None]
) -> None:
    chunks_of(1)
    strategy = make_strategy(make_plan(VALUES), **EVERYONE)
    _, grid = play(strategy, nodes_of(tmp_path, 2), rounds=1)
    assert grid.most_out == 3  # one is answered, and its node sent two, before the other's is
    _, grid = play(strategy, nodes_of(tmp_path, 2), rounds=1)
    assert grid.most_out == 4


def test_updates_are_folded_while_others_are_awaited(
    tmp_path: Path, chunks_of: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    add, take = Fold.add, Replies.take

    def noted_add(fold: Fold, update: Any) -> None:
        events.append("fold")
        add(fold, update)

    def noted_take(replies: Replies, *given: Any) -> Any:
        events.append("take")
        return take(replies, *given)

    monkeypatch.setattr(Fold, "add", noted_add)
    monkeypatch.setattr(Replies, "take", noted_take)
    chunks_of(2)
    play(make_strategy(make_plan(VALUES), **EVERYONE), nodes_of(tmp_path, 1), 1, LocalGrid)
    assert events == ["take", "fold", "fold"] * 4
    events.clear()
    comparing = make_strategy(make_plan(VALUES), name="fedmedian", **EVERYONE)
    play(comparing, nodes_of(tmp_path, 1), 1, LocalGrid)
    assert events == ["take"] * 4 + ["fold"] * 8


@pytest.mark.parametrize("codec", [VALUES, CHANGES])
def test_the_values_travel_once_a_round_and_node(
    codec: CodecConfig, tmp_path: Path, chunks_of: Callable[[int], None]
) -> None:
    chunks_of(1)
    carried: list[bool] = []

    def listening(handler: Handler) -> Handler:
        def answer(payload: bytes) -> bytes:
            carried.append(read_request(payload).held is None)
            return handler(payload)

        return answer

    handlers = {1: listening(nodes_of(tmp_path, 1)[1])}
    strategy = make_strategy(make_plan(codec), **EVERYONE)
    play(strategy, handlers, rounds=2, grid=LocalGrid)
    assert carried == ([True] + [False] * 7) * 2


@pytest.mark.parametrize("codec", [VALUES, ALL])
@pytest.mark.parametrize("mask", [None, TWO_TIERS])
def test_a_process_that_does_not_hold_the_values_is_sent_them(
    codec: CodecConfig,
    mask: MaskConfig | None,
    tmp_path: Path,
    chunks_of: Callable[[int], None],
) -> None:
    expected, _ = play(
        make_strategy(make_plan(codec, mask), **EVERYONE), nodes_of(tmp_path / "whole", 1)
    )
    chunks_of(1)
    settings = node_settings(tmp_path / "cut")
    held: list[bool] = []

    def forgetful(payload: bytes) -> bytes:
        held.append(read_request(payload).held is not None)
        return FakeNode(settings).answer(payload)

    cut = make_strategy(make_plan(codec, mask), **EVERYONE)
    values, _ = play(cut, {1: forgetful})
    assert values.tobytes() == expected.tobytes()
    assert not any(record.refused for record in cut.ledger.rounds)
    assert sum(held) <= 2 * 3  # a round: those on their way when it said so


def test_the_ledger_counts_every_message_of_every_chunk(
    tmp_path: Path, chunks_of: Callable[[int], None]
) -> None:
    chunks_of(1)
    strategy = make_strategy(make_plan(CHANGES, TWO_TIERS), **EVERYONE)
    _, grid = play(strategy, nodes_of(tmp_path, 2))
    assert strategy.ledger.total("wire_bytes") == grid.weight


# -- law 7 -----------------------------------------------------------------------------------


def test_a_chunk_that_fails_is_refused_alone_and_its_node_goes_on(
    tmp_path: Path, chunks_of: Callable[[int], None]
) -> None:
    chunks_of(2)

    class Failing(LocalGrid):
        asked = 0

        def _answer(self, message: Message) -> Message:
            self.asked += 1
            if self.asked == 2:
                return Message(Error(1, "out of memory"), reply_to=message)
            return super()._answer(message)

    strategy = make_strategy(make_plan(VALUES), **EVERYONE)
    play(strategy, nodes_of(tmp_path, 1), 1, Failing)
    refused = strategy.ledger.current.refused
    assert [one["who"] for one in refused] == list(CLIENTS[2:4])
    assert all("out of memory" in one["reason"] for one in refused)
    assert strategy.ledger.current.replies == 6


def test_a_node_that_lacks_what_it_was_just_sent_is_refused_by_its_reason(
    tmp_path: Path, chunks_of: Callable[[int], None]
) -> None:
    chunks_of(2)
    asked = [0]

    def never(payload: bytes) -> bytes:
        request = read_request(payload)
        asked[0] += 1
        held = request.held
        frame = None if held else frames_by_tier(request)[0][0]
        digest, number = (
            (held.digest, held.server_round) if held else (frame.plan_digest, frame.server_round)  # type: ignore[union-attr]
        )
        return b"".join(
            pack_refusal(Refusal(digest, number, client, "no", RefusalCode.VALUES_MISSING))
            for client in request.clients
        )

    strategy = make_strategy(make_plan(VALUES), **EVERYONE)
    play(strategy, {1: never}, 1)
    assert [one["who"] for one in strategy.ledger.current.refused] == list(CLIENTS)
    assert asked[0] <= 2 * 4


def test_a_client_s_frame_counts_in_the_answer_to_its_own_message_alone(
    tmp_path: Path, chunks_of: Callable[[int], None]
) -> None:
    """A node that answers the second message with the first one's frames, too."""
    chunks_of(1)
    before: list[bytes] = []
    honest = nodes_of(tmp_path, 1)[1]

    def repeating(payload: bytes) -> bytes:
        answer = honest(payload)
        before.append(answer)
        return b"".join(before[-2:])

    strategy = make_strategy(make_plan(VALUES), **EVERYONE)
    play(strategy, {1: repeating}, 1, LocalGrid)
    assert strategy.ledger.current.replies == 8
    refused = strategy.ledger.current.refused
    assert len(refused) == 7
    assert all("was not asked to train this client" in one["reason"] for one in refused)


def test_a_client_that_was_refused_is_not_averaged_by_a_second_frame(tmp_path: Path) -> None:
    honest = nodes_of(tmp_path, 1)[1]

    def twice(payload: bytes) -> bytes:
        answer = honest(payload)
        first = next(unpack_frames(answer, max_frames=99, max_payload_bytes=1 << 20))
        refusal = Refusal(first.plan_digest, first.server_round, first.client, "I will not")
        return pack_refusal(refusal) + answer

    strategy = make_strategy(make_plan(VALUES), **EVERYONE)
    play(strategy, {1: twice}, 1)
    assert strategy.ledger.current.replies == 7
    assert {one["who"] for one in strategy.ledger.current.refused} == {CLIENTS[0]}


def test_at_the_deadline_those_whose_turn_had_not_come_are_told_apart(
    tmp_path: Path, chunks_of: Callable[[int], None]
) -> None:
    chunks_of(1)

    class Stuck(LocalGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            return list(super().pull_messages([n for n in message_ids if n == "message-0"]))

    strategy = make_strategy(make_plan(codec_of()), **EVERYONE)
    play(strategy, nodes_of(tmp_path, 1), 1, Stuck, timeout=0.2)
    reasons = {one["who"]: one["reason"] for one in strategy.ledger.current.refused}
    assert sorted(reasons) == list(CLIENTS[1:])
    assert all("no reply came" in reasons[name] for name in CLIENTS[1:3])
    assert all("before its turn" in reasons[name] for name in CLIENTS[3:])


def test_a_request_s_bytes_do_not_depend_on_what_came_before(tmp_path: Path) -> None:
    """Of one chunk a node nothing has moved: values whole, no name of them."""
    strategy = make_strategy(make_plan(VALUES), **EVERYONE)
    seen: list[Message] = []

    class Listening(LocalGrid):
        def _answer(self, message: Message) -> Message:
            seen.append(message)
            request = read_request(from_record(message.content))
            assert request.held is None
            return super()._answer(message)

    play(strategy, nodes_of(tmp_path, 2), 2, Listening)
    assert len(seen) == 4
