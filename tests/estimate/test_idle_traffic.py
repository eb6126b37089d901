"""The traffic of an idle node is reckoned by the pauses that a node keeps."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedpet.client import supernode
from fedpet.estimate import idle_traffic
from fedpet.estimate.idle_traffic import REQUEST_BYTES, idle_bytes


def test_the_estimate_s_pauses_are_the_node_s() -> None:
    assert idle_traffic.ACTIVE_POLL == supernode.POLL_SECONDS
    assert idle_traffic.IDLE_POLL == supernode.LONGEST_POLL_SECONDS
    assert idle_traffic.ACTIVE_HEARTBEAT == supernode.HEARTBEAT_SECONDS
    assert idle_traffic.IDLE_HEARTBEAT == supernode.IDLE_HEARTBEAT_SECONDS


def test_a_day_is_its_polls_and_its_signs_of_life() -> None:
    found = idle_bytes()
    assert found["idle_bytes_per_node_day_polled"] == pytest.approx(
        REQUEST_BYTES * (86400 / 3 + 86400 / 20)
    )
    assert found["idle_bytes_per_node_day"] == pytest.approx(
        REQUEST_BYTES * (86400 / 60 + 86400 / 236)
    )
    assert found["idle_bytes_per_node_day"] < found["idle_bytes_per_node_day_polled"] / 15


def test_an_estimate_shows_it_in_a_line_of_its_own(tmp_path: Path) -> None:
    import io

    from rich.console import Console

    from fedpet.config import Experiment
    from fedpet.estimate import estimate
    from fedpet.report.estimate_table import estimate_table

    text = io.StringIO()
    found = estimate(Experiment(), num_clients=10, rows_per_client=20)
    Console(file=text, width=200).print(estimate_table(found))
    assert found.to_json()["communication"]["idle_bytes_per_node_day"] > 0
    [line] = [line for line in text.getvalue().splitlines() if "a real node, idle" in line]
    assert "a day" in line
