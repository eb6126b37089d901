"""The picture joins the rows that no other beats at fewer bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.frontier import draw_frontier, family_of, frontier

ROWS = {
    "mask-smallest": (10.0, 0.6, 0.01),
    "lora": (30.0, 0.58, 0.0),
    "full": (900.0, 0.7, 0.02),
    "head": (2.0, 0.5, 0.0),
    "mask-random": (10.0, 0.55, 0.0),
}


def test_no_row_off_the_frontier_is_both_cheaper_and_better_than_one_on_it() -> None:
    best = frontier(ROWS)
    assert best == ["head", "mask-smallest", "full"]
    for name in set(ROWS) - set(best):
        assert any(ROWS[one][0] <= ROWS[name][0] and ROWS[one][1] >= ROWS[name][1] for one in best)


def test_families_have_colours_of_their_own() -> None:
    assert family_of("mask-random") == family_of("mask-smallest") != family_of("lora-all")
    assert family_of("ffa-lora") == family_of("lora-r1")
    assert family_of("full") == family_of("head")


@pytest.mark.parametrize("panels", [1, 4])
def test_a_picture_is_drawn_of_any_number_of_data_sets(tmp_path: Path, panels: int) -> None:
    sets = {f"set {number}": ROWS for number in range(panels)}
    draw_frontier(sets, {"set 0": {"probe": 0.55, "majority": 0.5}}, tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")
