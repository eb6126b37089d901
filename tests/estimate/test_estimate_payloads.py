"""Payloads and messages of an estimate: as long as codecs, server and Flower make them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_training import make_plan
from hypothesis import given, settings
from hypothesis import strategies as st
from sending import codec_of
from tiny import Silent

from fedpet.codec import encode_positions, max_payload_bytes
from fedpet.config import Experiment, StrategyConfig, TrainingConfig
from fedpet.estimate import estimate, outline
from fedpet.estimate.message_sizes import made_up_plan
from fedpet.estimate.participants import Participant
from fedpet.estimate.payload_simulation import Payloads, payloads
from fedpet.run.federate import prepare

KINDS = [("mask", 5000), ("lnfit", 400), ("head", 66)]


def lengths_of(
    kinds: list[tuple[str, int]],
    rows: list[list[int]],
    codec: str = "float32",
    training: TrainingConfig | None = None,
) -> Payloads:
    """Payloads of clients with these rows, by round."""
    plan = make_plan(
        num_values=sum(size for _, size in kinds),
        codec=codec_of(uplink=codec, downlink=codec, downlink_mode="full"),
        training=training or TrainingConfig(learning_rate=1e-3),
        num_rounds=len(rows),
        seed=0,
    )
    rounds = [[Participant(client, n, 0) for client, n in enumerate(each)] for each in rows]
    return payloads([kinds], plan, StrategyConfig(), rounds)


def test_the_payload_of_many_values_is_that_of_few_scaled_up() -> None:
    """Beyond 65,536 values a share of them is played through."""
    rows = [[32] * 3] * 3
    few = lengths_of(KINDS, rows)
    many = lengths_of([(kind, 40 * size) for kind, size in KINDS], rows)
    assert many.up == pytest.approx(40 * few.up, rel=0.02)
    assert many.down[1:] == pytest.approx(40 * few.down[1:], rel=0.02)


def test_the_payloads_of_a_long_run_join_those_that_were_played_through() -> None:
    short = lengths_of(KINDS, [[32] * 4] * 20)
    long = lengths_of(KINDS, [[32] * 4] * 200)
    assert long.up.shape == long.down.shape == (200, 1)
    assert long.down[0] == short.down[0] < 0.05 * short.down[1]
    assert np.all(np.diff(long.up[:, 0]) <= 0.02 * long.up[0])  # ever smaller against the values
    assert long.up[:20].mean() == pytest.approx(short.up.mean(), rel=0.02)


@settings(max_examples=30)
@given(
    codec=st.sampled_from(["float32", "int8", "eden-3", "topk-0.2+bfloat16", "int4-raw"]),
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=4),
    rows=st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=3), min_size=1, max_size=3),
)
def test_no_payload_is_longer_than_its_codec_can_write(
    codec: str, sizes: list[int], rows: list[list[int]]
) -> None:
    stops = np.cumsum(sizes).tolist()
    most = max_payload_bytes(codec, list(zip([0, *stops[:-1]], stops, strict=True)))
    lengths = lengths_of([("lora", size) for size in sizes], rows, codec)
    assert lengths.up.shape == lengths.down.shape == (len(rows), 1)
    assert np.all(lengths.up <= most)
    assert np.all(lengths.down <= most)


def test_a_made_up_plan_is_as_long_as_a_real_one(experiment: Any) -> None:
    from fedpet.estimate import count_values

    settings = experiment(mask_tiers=["0.01=0.5", "0.05=0.5"])
    prepared = prepare(settings, Silent())
    layout = count_values(outline(settings.backbone, prepared.plan.task), settings)
    made_up = made_up_plan(settings, layout, prepared.plan.task)
    assert abs(len(made_up.to_bytes()) - len(prepared.plan.to_bytes())) <= 8
    assert made_up.num_values == prepared.plan.num_values


def test_coded_positions_are_near_the_entropy_that_the_mask_is_reckoned_by() -> None:
    """Closeness of the coder, on a set as dense everywhere: within 3 % of n H(p)."""
    n, p = 1_000_000, 0.005
    chosen = np.flatnonzero(np.random.default_rng(0).random(n) < p)
    share = len(chosen) / n
    bound = -n * (share * math.log2(share) + (1 - share) * math.log2(1 - share)) / 8
    assert bound <= len(encode_positions([chosen], [n])) <= 1.03 * bound


def test_a_large_model_is_estimated_in_seconds(tmp_path: Path) -> None:
    """Seven billion parameters, 32 million of them communicated: a share is played through."""
    import tracemalloc

    from transformers import LlamaConfig

    LlamaConfig().save_pretrained(tmp_path)
    settings = Experiment.from_tables(
        {"backbone": {"model": str(tmp_path / "config.json")}, "codec": {"uplink": "eden-2"}}
    )
    tracemalloc.start()
    try:
        told = estimate(settings, num_clients=1000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 200e6
    values = told.model["communicated_values"]
    assert values > 32e6
    assert told.message["up_bits_per_value"] == pytest.approx(1.95, abs=0.1)
    assert told.communication["dense_fedavg_total_bytes"] == 2 * 4 * 6_607_351_808 * 20 * 10
