"""A node's own config: its places stand above the experiment's, and what cannot be is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedpet.client.node_config import NodeConfig
from fedpet.errors import ConfigError


@pytest.mark.parametrize(
    ("node_config", "words"),
    [
        ({"dta": "x"}, "unknown key .*'dta'.* Known are: .*client-column"),
        ({"data": 3}, "data .* must be a str"),
        ({"data": ""}, "data .* must be a str"),
        ({"data": "x", "threads": -1}, "at least 1, got -1"),
        ({"data": "x", "threads": True}, "must be a int"),
        ({"data": "x", "client": "a", "client-column": "b"}, "both a client and a client-column"),
        ({"client": "a"}, "no data: give the file"),
    ],
)
def test_a_node_config_that_cannot_be_is_refused(
    experiment: Any, node_config: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        NodeConfig.from_experiment(experiment(), node_config)


def test_a_simulated_node_s_config_changes_nothing(experiment: Any) -> None:
    settings = NodeConfig.from_experiment(experiment())
    assert (
        NodeConfig.from_experiment(experiment(), {"partition-id": 0, "num-partitions": 2})
        == settings
    )


def test_a_node_s_own_places_stand_above_the_experiment_s(experiment: Any) -> None:
    settings = NodeConfig.from_experiment(
        experiment(),
        {
            "data": "mine",
            "client": "device-7",
            "split": "day",
            "text-columns": "a, b",
            "label-column": "y",
            "backbone": "/opt/model",
            "cache": "/var/cache",
            "threads": 3,
        },
    )
    assert (settings.data.source, settings.data.train_split) == ("mine", "day")
    assert (settings.data.text_columns, settings.data.label_column) == (("a", "b"), "y")
    assert (settings.backbone.model, settings.cache) == ("/opt/model", Path("/var/cache"))
    assert (settings.client, settings.threads) == ("device-7", 3)
