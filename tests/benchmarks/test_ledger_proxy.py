"""Law 9: what the ledger says of a deployment is what a proxy on its sockets counts."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import pytest
import tiny
from deployed import Place

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

RUN_SECONDS = 400.0


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two nodes for two rounds, messages of about 66 KB, each node behind a proxy."""
    from benchmarks.socket_vs_ledger import compare, run_tapped

    folder = tmp_path_factory.mktemp("books")
    rows = tiny.make_rows(folder / "rows", clients=2, rows_per_client=8)
    place = Place((tiny.make_backbone(folder / "backbone"), rows), folder, ["one", "two"])
    large = {"mask_density": 0.9, "codec_uplink": "float32-raw", "codec_downlink": "float32-raw"}
    started = time.monotonic()
    with place.deploy(2, strategy_num_rounds=2, **large) as real:
        nodes = run_tapped(real, place.names, limit_seconds=RUN_SECONDS)
        communication, lines = real.result("tiny-1")["communication"], real.rounds("tiny-1")
    found = compare(nodes, communication)
    return found | {
        "books": communication,
        "lines": lines,
        "seconds": time.monotonic() - started,
    }


def test_the_ledger_holds_every_message_to_the_byte(books: dict[str, Any]) -> None:
    # A question and its answer a node, then a train message and its reply a node and round.
    assert books["messages"] == books["ledger_messages"] == 2 * (2 + 2 * 2)
    assert books["messages_bytes"] == books["ledger_wire_bytes"]
    assert sum(line["wire_bytes"] for line in books["lines"]) == books["messages_bytes"]
    for name, node in books["nodes"].items():
        assert node["messages_up"] == node["messages_down"] == 3
        each: Counter[str] = Counter()
        for line in books["lines"]:
            each.update(line["wire_by_node"].get(name, {}))
        down = each["plan down"] + each["query down"] + each["train down"]
        assert down == node["messages_down_bytes"]
        assert each["query up"] + each["train up"] == node["messages_up_bytes"]


def test_what_each_client_alone_would_send_is_what_a_node_of_one_client_sends(
    books: dict[str, Any],
) -> None:
    # But for the ids in Flower's metadata, which are fixed there: a few bytes a message.
    counted = books["books"]["total_bytes"]
    assert counted == pytest.approx(books["messages_bytes"], abs=20 * books["messages"])


def test_a_proxy_on_the_sockets_counts_what_the_ledger_and_the_stated_terms_say(
    books: dict[str, Any],
) -> None:
    from benchmarks.socket_vs_ledger import TOLERANCE, holds

    assert abs(books["deviation"]) <= TOLERANCE
    assert all(abs(node["deviation"]) <= TOLERANCE for node in books["nodes"].values())
    assert holds(books)


def test_polls_and_heartbeats_go_by_time_and_requests_by_messages(books: dict[str, Any]) -> None:
    for node in books["nodes"].values():
        requests = node["requests"]
        assert (requests["down"], requests["up"]) == (7 * 3, 6 * 3)
        assert requests["poll"] <= books["seconds"] / 3 + 20  # parts not yet there among them
        assert requests["heartbeat"] <= books["seconds"] / 20 + 1
        assert (requests["app"], requests["join"]) == (2, 2)


def test_the_app_bundle_comes_once_and_there_is_nothing_else(books: dict[str, Any]) -> None:
    for node in books["nodes"].values():
        purposes = {"down", "up", "poll", "heartbeat", "join", "app", "again"}
        assert set(node["beside"]) == purposes
        assert 2_000 < node["beside"]["app"] < 20_000
