"""A grid of three rates moves until its best lies inside, and says where it does not."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from benchmarks.moving_grid import SIZE, Choice, choose_rate, next_rate
from fedpet.errors import ConfigError


def settle(start: float, scores: Mapping[float, float | None], most: int = 6) -> Choice:
    return choose_rate(start, scores.__getitem__, most=most)


def test_rates_climb_the_ladder_of_one_three_ten() -> None:
    assert [next_rate(3e-4, step) for step in (-2, -1, 0, 1, 2)] == [3e-5, 1e-4, 3e-4, 1e-3, 3e-3]
    with pytest.raises(ConfigError, match=r"1 or 3 times a power of ten, got 0.02"):
        next_rate(0.02)


def test_the_first_grid_is_the_start_and_its_neighbours() -> None:
    assert settle(0.1, {}) == Choice((0.03, 0.1, 0.3), (0.03, 0.1, 0.3))
    assert settle(0.1, {0.1: 0.5}).missing == (0.03, 0.3)


def test_a_best_inside_is_chosen_and_no_more_is_run() -> None:
    found = settle(0.1, {0.03: 0.5, 0.1: 0.7, 0.3: 0.6})
    assert found == Choice((0.03, 0.1, 0.3), (), 0.1)


def test_a_best_at_the_edge_asks_for_the_next_rate_on_its_side() -> None:
    rising = {0.03: 0.5, 0.1: 0.6, 0.3: 0.7}
    assert settle(0.1, rising).missing == (1.0,)
    assert settle(0.1, {**rising, 1.0: 0.6}) == Choice((0.03, 0.1, 0.3, 1.0), (), 0.3)
    assert settle(0.1, {0.03: 0.7, 0.1: 0.6, 0.3: 0.5}).missing == (0.01,)


def test_a_grid_that_may_not_move_on_is_flagged() -> None:
    found = settle(0.1, {0.03: 0.5, 0.1: 0.6, 0.3: 0.7, 1.0: 0.8}, most=4)
    assert (found.best, found.at_edge, len(found.tried)) == (1.0, True, 4)


def test_the_best_has_a_worse_neighbour_on_either_side_wherever_it_lies() -> None:
    ladder = [next_rate(1e-4, step) for step in range(14)]
    for top in range(3, 10):
        scores = {rate: -abs(place - top) for place, rate in enumerate(ladder)}
        found = choose_rate(ladder[6], scores.__getitem__, most=9)
        assert found.best == ladder[top]
        assert not found.at_edge
        assert {ladder[top - 1], ladder[top + 1]} <= set(found.tried)
        assert len(found.tried) >= SIZE


def test_where_every_rate_diverges_the_grid_goes_down_and_then_gives_up() -> None:
    none = dict.fromkeys((0.003, 0.01, 0.03, 0.1, 0.3))
    assert settle(0.1, none, most=5) == Choice((0.003, 0.01, 0.03, 0.1, 0.3), (), None, True)


def test_of_equal_metrics_the_smaller_rate_is_taken_and_a_lower_error_is_better() -> None:
    assert settle(0.1, {0.01: 0.1, 0.03: 0.7, 0.1: 0.7, 0.3: 0.5}).best == 0.03
    errors = {0.03: 0.5, 0.1: 0.3, 0.3: 0.6}
    assert choose_rate(0.1, errors.__getitem__, most=6, greater=False).best == 0.1
