"""A search's settings, settled before it begins: its budget in values, its rates by kind."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedpet.config import SearchConfig, TrainingConfig
from fedpet.errors import ConfigError, StructureError
from fedpet.run import central_search
from fedpet.search import budget_values, resolve_settings


def test_a_budget_in_bytes_counts_what_the_uplink_s_codec_makes_of_a_value() -> None:
    config = SearchConfig(budget="8kB", learning_rate=0.1)
    values = {
        codec: resolve_settings(
            config,
            TrainingConfig(),
            backbone_parameters=10**6,
            bytes_per_value=central_search.bytes_per_value(codec),
        ).budget
        for codec in ("float32", "bfloat16", "int8", "int4", "eden-1")
    }
    assert values == {
        "float32": 2000, "bfloat16": 4000, "int8": 8000, "int4": 16000, "eden-1": 64000,
    }  # fmt: skip
    with pytest.raises(ConfigError, match="sends every value"):
        central_search.bytes_per_value("topk-0.1+int8")


def test_a_number_and_its_text_are_the_same_budget() -> None:
    for budget in (2000, 0.001):
        assert budget_values(budget, backbone_parameters=10**6) == budget_values(
            str(budget), backbone_parameters=10**6
        )


def test_one_budget_may_hold_the_mask_and_the_structure() -> None:
    config = SearchConfig(budget=1000, mask_in_budget=True, learning_rate=0.1)

    def settled(mask_values: int) -> SearchConfig:
        return resolve_settings(
            config, TrainingConfig(), backbone_parameters=10**6, mask_values=mask_values
        )

    assert settled(400).budget == 600
    assert resolve_settings(
        replace(config, mask_in_budget=False), TrainingConfig(), backbone_parameters=10**6,
        mask_values=400,
    ).budget == 1000  # fmt: skip
    with pytest.raises(StructureError, match="the mask alone has 1000"):
        settled(1000)


def test_a_search_without_rates_of_its_own_takes_those_of_training_by_kind() -> None:
    training = TrainingConfig(learning_rate=0.2, learning_rates=("head=0.01", "mask=0.002"))
    settled = resolve_settings(SearchConfig(budget=5), training, backbone_parameters=10)
    assert [settled.rate_of(kind) for kind in ("lora", "head", "mask")] == [0.2, 0.01, 0.002]
    own = resolve_settings(
        SearchConfig(budget=5, learning_rate=0.5), training, backbone_parameters=10
    )
    assert [own.rate_of(kind) for kind in ("lora", "head")] == [0.5, 0.5]
