"""Weights of clients: as they were by default, alike, or none above its share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from in_process_run import run

from fedpet.config import Experiment
from fedpet.config.strategy_registry import StrategyConfig
from fedpet.errors import ConfigError
from fedpet.server.client_weights import client_weights

EXAMPLES = st.dictionaries(st.text(max_size=3), st.integers(1, 2**32 - 1), min_size=1, max_size=20)
SHARES = st.floats(0.01, 1)


@given(EXAMPLES)
def test_without_a_bound_each_weighs_its_examples(examples: dict[str, int]) -> None:
    assert client_weights(examples) == examples


@given(EXAMPLES, SHARES)
def test_nobody_is_above_the_share_and_who_is_below_keeps_its_weight(
    examples: dict[str, int], share: float
) -> None:
    weights = client_weights(examples, max_share=share)
    if len(examples) * share > 1 + 1e-9:
        assert max(weights.values()) <= share * sum(weights.values()) * (1 + 1e-9)
    highest = max(weights.values())
    assert all(w == examples[n] or w == highest for n, w in weights.items())
    if max(examples.values()) <= share * sum(examples.values()):
        assert weights == examples


@given(EXAMPLES, SHARES)
def test_too_few_for_the_share_weigh_alike(examples: dict[str, int], share: float) -> None:
    if len(examples) * share < 1 - 1e-9:
        assert set(client_weights(examples, max_share=share).values()) == {1}


@given(EXAMPLES)
def test_uniform_weights_do_not_ask_for_examples(examples: dict[str, int]) -> None:
    assert set(client_weights(examples, rule="uniform").values()) == {1}


def test_a_claim_of_all_rows_moves_the_mean_by_its_share_and_no_more() -> None:
    weights = client_weights({"honest": 64, "other": 64, "liar": 2**32 - 1}, max_share=0.4)
    assert weights["liar"] / sum(weights.values()) == pytest.approx(0.4)


def test_a_share_that_binds_nobody_leaves_a_run_s_values_as_they_are(
    experiment: Callable[..., Experiment],
) -> None:
    plain = run(experiment(strategy_num_rounds=2))["final_values_sha256"]
    loose = run(experiment(strategy_num_rounds=2, strategy_max_share=0.999))
    assert loose["final_values_sha256"] == plain
    alike = run(experiment(strategy_num_rounds=2, strategy_weights="uniform"))
    tight = run(experiment(strategy_num_rounds=2, strategy_max_share=0.01))
    assert tight["final_values_sha256"] == alike["final_values_sha256"]


def test_other_rules_of_weights_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"strategy\.weights"):
        StrategyConfig(weights="loss")
    with pytest.raises(ConfigError, match=r"strategy\.max-share must be in \(0, 1\]"):
        StrategyConfig(max_share=0.0)
