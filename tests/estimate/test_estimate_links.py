"""Test the rates of links: seconds on air, sources, and how a duration reads."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fedpet.errors import ConfigError
from fedpet.estimate import LINKS, estimate, find_links
from fedpet.utils.formatting import show_duration


def test_a_lorawan_frame_takes_the_time_on_air_of_its_formula() -> None:
    """Semtech AN1200.13: SF7, 125 kHz, coding rate 4/5, explicit header, CRC; 222 bytes + 13."""
    symbol = 2**7 / 125e3
    payload = 222 + 13
    symbols = 8 + math.ceil((8 * payload - 4 * 7 + 28 + 16) / (4 * 7)) * 5
    on_air = (8 + 4.25 + symbols) * symbol
    [lorawan] = find_links(["lorawan"])
    assert lorawan.up.seconds(222) == pytest.approx(on_air / 0.01, rel=0.02)
    assert lorawan.up.seconds(10 * 222) == pytest.approx(10 * lorawan.up.seconds(222))
    assert lorawan.up.seconds(223) - lorawan.up.seconds(222) > 100 * 0.02  # another frame's head


def test_a_link_without_frames_takes_its_bits_at_its_rate() -> None:
    for name, up, down in (("nb-iot", 62_500, 26_154), ("lte-m", 375e3, 300e3), ("4g", 5e7, 1.5e8)):
        [link] = find_links([name])
        assert link.up.seconds(1e6) == pytest.approx(8e6 / up, rel=1e-4)
        assert link.down.seconds(1e6) == pytest.approx(8e6 / down, rel=1e-4)


def test_every_link_names_its_sources() -> None:
    assert [link.name for link in LINKS] == ["lorawan", "nb-iot", "lte-m", "4g", "wifi"]
    assert all(link.sources and link.what for link in LINKS)
    assert find_links([]) == LINKS
    assert [link.name for link in find_links(["WiFi", "4g", "wifi"])] == ["wifi", "4g"]


def test_an_unknown_link_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"no link 'pigeon'.*lorawan, nb-iot, lte-m, 4g, wifi"):
        find_links(["pigeon"])


def test_the_seconds_of_a_run_are_those_of_its_rounds_and_one_plan(experiment: Any) -> None:
    told = estimate(experiment(strategy_num_rounds=3))
    for link in told.links:
        assert link["round_seconds"] == link["up_seconds"] + link["down_seconds"]
        assert link["run_seconds"] == 3 * link["round_seconds"] + link["plan_seconds"]
        assert link["dense_round_seconds"] > link["lora_round_seconds"] > 0


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.0000421, "0.0421 ms"),
        (0.9999, "1 s"),
        (59.99, "1 min"),
        (3600 * 47, "47 h"),
        (3600 * 49, "2.04 days"),
        (86400 * 365.25 * 9.45, "9.45 years"),
        (86400 * 365.25 * 12345, "12,345 years"),
    ],
)
def test_a_duration_reads_in_one_unit(seconds: float, shown: str) -> None:
    assert show_duration(seconds) == shown
