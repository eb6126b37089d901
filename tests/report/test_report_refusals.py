"""Refused replies, counted by node and reason."""

from __future__ import annotations

from fedpet.report.refusals import count_refusals


def refusal(server_round: int, who: str, reason: str, node: str | None = None) -> dict[str, object]:
    known = {} if node is None else {"node": node}
    return {"round": server_round, "who": who, **known, "reason": reason}


def test_a_node_that_is_wrong_in_one_way_for_many_rounds_is_one_line() -> None:
    stale = [
        refusal(n, "film-1", f"the frame is of round {n + 3}, this is {n}.", "7") for n in (1, 2, 3)
    ]
    [count] = count_refusals(stale)
    assert (count.times, count.node, count.rounds) == (3, "7", (1, 2, 3))
    assert count.reason == "the frame is of round …, this is …."


def test_reasons_and_nodes_are_told_apart_and_the_most_frequent_comes_first() -> None:
    counts = count_refusals(
        [
            refusal(1, "a", "node 7: no room", "7"),
            refusal(1, "b", "node 7: no room", "7"),
            refusal(2, "a", "the update holds NaN or infinity.", "7"),
            refusal(2, "c", "node 8: no room", "8"),
            refusal(2, "d", "no room"),
        ]
    )
    assert [(c.times, c.node, c.reason, c.clients) for c in counts] == [
        (2, "7", "no room", ("a", "b")),
        (1, "", "no room", ("d",)),
        (1, "7", "the update holds NaN or infinity.", ("a",)),
        (1, "8", "no room", ("c",)),
    ]


def test_a_reason_that_is_the_same_each_time_keeps_its_numbers() -> None:
    [count] = count_refusals([refusal(n, "a", "no reply within 5 seconds.") for n in (1, 2)])
    assert count.reason == "no reply within 5 seconds."
