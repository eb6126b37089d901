"""Every method goes through fedpet's messages, codecs and books."""

from __future__ import annotations

from typing import Any

import in_process_run
import numpy as np
import pytest
import torch
from baseline_runs import BaselineGrid
from tiny import Silent

from benchmarks import baselines, dense_rounds, one_process
from benchmarks.baselines import METHODS, Baseline
from benchmarks.baselines.one_vector import BaselineVector
from benchmarks.gradient_mask import gradient_mask
from benchmarks.one_process import GRADIENT, RUNS, DivergedError, run_here
from fedpet.backbone.module_roles import maskable_weights
from fedpet.backbone.pretrained import load_for_task, locate
from fedpet.client.node_config import cache_folder
from fedpet.config import Experiment, MaskConfig
from fedpet.data import FederatedData, load_data
from fedpet.errors import ConfigError, RunError
from fedpet.pet.mask import build_mask
from fedpet.run.run_folder import new_run_folder

CODED = {"codec_uplink": "dither-3", "codec_downlink": "dither-5", "codec_downlink-mode": "full"}


@pytest.fixture
def data(experiment: Any) -> FederatedData:
    return rows_of(experiment())


def rows_of(settings: Experiment) -> FederatedData:
    cache = cache_folder(settings)
    return load_data(settings.data, settings.clients, locate(settings.backbone), cache=cache)


def vector(settings: Experiment, method: str) -> BaselineVector:
    return BaselineVector(Baseline(method, settings, rows_of(settings)))


def final_values(
    settings: Experiment, method: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[np.ndarray, dict[str, Any]]:
    seen: list[np.ndarray] = []
    rounds = one_process._rounds

    def kept(*args: Any) -> Any:
        values, final = rounds(*args)
        seen.append(values.copy())
        return values, final

    monkeypatch.setattr(one_process, "_rounds", kept)
    result = run_here(settings, method)
    return seen[0], result


# -- equalities ----------------------------------------------------------------------------------


def test_fedpet_in_one_process_comes_to_the_bits_and_bytes_of_a_run(experiment: Any) -> None:
    settings = experiment(**CODED)
    whole, here = in_process_run.run(settings), run_here(settings, "fedpet")
    assert here["final_values_sha256"] == whole["final_values_sha256"]
    for key in ("uplink_bytes", "downlink_bytes", "plan_bytes", "total_bytes"):
        assert here["communication"][key] == whole["communication"][key], key


@pytest.mark.parametrize("method", ["peft-lora", "full"])
def test_a_baseline_by_the_lossless_codec_learns_what_it_learns_uncoded(
    method: str, experiment: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # by plain gradients: AdamW scales up those that are nothing but rounding
    settings = experiment(training_optimizer="sgd", training_learning_rate=0.1)
    prepared = baselines.prepare_baseline(method, settings, Silent())
    uncoded = baselines.federate_baseline(
        BaselineGrid(method, settings), prepared, new_run_folder(settings), Silent()
    )
    expected = prepared.baseline.tensors
    start = Baseline(method, settings, prepared.data)
    values, coded = final_values(settings, method, monkeypatch)
    assert np.abs(values).max() > 0.01
    BaselineVector(start).set_delta(values)
    for name, tensor in start.tensors.items():
        assert torch.allclose(tensor, expected[name], atol=1e-5), name
    assert coded["quality"]["final"] == uncoded["quality"]["final"]
    assert coded["model"]["values_by_kind"] == uncoded["model"]["values_by_kind"]


def test_every_method_runs_by_the_lossy_codec_with_fewer_bytes_than_without(
    experiment: Any,
) -> None:
    assert set(RUNS) == {"fedpet", GRADIENT, *METHODS}
    short = {"strategy_num_rounds": 1, "strategy_clients-per-round": 1}
    for method in RUNS:
        plain, coded = (run_here(experiment(**short, **codec), method) for codec in ({}, CODED))
        assert coded["run"]["status"] == "ok", method
        last = coded["curve"][-1]
        assert last[0] == 1
        assert last[2] == coded["communication"]["total_bytes"]
        floor = 600  # of a message without values
        for way in ("uplink_bytes", "downlink_bytes"):
            sent, before = (run["communication"][way] for run in (coded, plain))
            assert sent < 0.4 * before + floor, method


def test_a_quarter_of_lora_travels_by_top_k_and_the_head_whole(experiment: Any) -> None:
    part = {
        "codec_uplink": "topk-0.25+dither-3", "codec_head-uplink": "dither-3",
        "codec_downlink": "topk-0.25+dither-5", "codec_head-downlink": "dither-5",
        "codec_downlink-mode": "full",
    }  # fmt: skip
    changes = {"strategy_num_rounds": 2, "structure_preset": "none"}
    whole, sparse = (
        run_here(experiment(**changes, **codec), "peft-lora")["communication"]
        for codec in (CODED, part)
    )
    assert 0.2 < sparse["uplink_bytes"] / whole["uplink_bytes"] < 0.85  # framing counted
    assert sparse["downlink_bytes"] < whole["downlink_bytes"]


# -- whole models without messages ---------------------------------------------------------------


def test_rounds_without_messages_come_to_the_values_of_those_with_them(
    experiment: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # AdamW would make steps of the rounding where a gradient is zero, as a key's bias has it.
    plain = {"training_optimizer": "sgd", "training_learning_rate": 0.1}
    settings = experiment(codec_uplink="float32", codec_downlink="float32", **plain)
    sent, by_messages = final_values(settings, "full", monkeypatch)
    kept: list[np.ndarray] = []
    dense = one_process.run_dense

    def noted(*args: Any) -> np.ndarray:
        kept.append(dense(*args).copy())
        return kept[0]

    monkeypatch.setattr(one_process, "run_dense", noted)
    monkeypatch.setattr(dense_rounds, "MOST_SENT", 0)
    here = run_here(settings, "full", also=["test"])
    assert np.abs(sent).max() > 1e-3
    np.testing.assert_allclose(kept[0], sent, rtol=1e-4, atol=1e-6)
    assert here["also"]["test"]["initial"] == here["quality"]["before"]
    assert here["also"]["test"]["final"] == here["quality"]["final"]
    assert here["communication"]["reckoned"]
    assert "reckoned" not in by_messages["communication"]
    rounds, clients = settings.strategy.num_rounds, settings.strategy.clients_per_round
    assert here["communication"]["uplink_bytes"] == 4 * len(sent) * rounds * clients


def test_rounds_without_messages_that_diverge_are_told(
    experiment: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense_rounds, "MOST_SENT", 0)
    settings = experiment(
        codec_uplink="float32", codec_downlink="float32", training_learning_rate=1e30
    )
    with pytest.raises(DivergedError):
        run_here(settings, "full")


# -- a baseline's vector -------------------------------------------------------------------------


@pytest.mark.parametrize("method", sorted(METHODS))
def test_zeros_are_the_start_and_what_is_written_is_read_again(
    method: str, experiment: Any
) -> None:
    model = vector(experiment(), method)
    assert not model.get_delta().any()
    wanted = torch.linspace(-0.5, 0.5, model.num_values)
    model.set_delta(wanted)
    assert torch.allclose(model.get_delta(), wanted, atol=1e-6)
    model.set_delta(torch.zeros(model.num_values))
    assert not model.get_delta().any()


def _changes(model: BaselineVector, delta: torch.Tensor) -> list[torch.Tensor]:
    """Return the change that LoRA makes to each dense weight at these values."""
    model.set_delta(delta)
    return [
        module.get_delta_weight("default").detach().clone()
        for module in model.model.modules()
        if hasattr(module, "get_delta_weight") and hasattr(module, "lora_A")
    ]


def test_the_mean_of_ffa_loras_values_is_the_mean_of_models_and_of_loras_is_not(
    experiment: Any,
) -> None:
    for method, exact in (("ffa-lora", True), ("peft-lora", False)):
        model = vector(experiment(), method)
        assert bool(model.inexact_kinds) is not exact
        generator = torch.Generator().manual_seed(1)
        one, two = (torch.randn(model.num_values, generator=generator) for _ in range(2))
        means = _changes(model, (one + two) / 2)
        pairs = zip(_changes(model, one), _changes(model, two), strict=True)
        same = [
            torch.allclose(mean, (a + b) / 2, atol=1e-4)
            for mean, (a, b) in zip(means, pairs, strict=True)
        ]
        assert same
        assert all(same) is exact, method


def test_supertuning_trains_the_entries_that_a_mask_of_each_tensor_would(
    experiment: Any, data: FederatedData
) -> None:
    settings = experiment()
    plain = load_for_task(settings.backbone, data.task, device="cpu")
    for method, rule in (("supertuning", "largest"), ("supertuning-bottom", "smallest")):
        scope = {
            name: weight
            for name, weight in maskable_weights(plain.model, plain.head).items()
            if ".layer." in name
        }
        config = MaskConfig(density=0.05, rule=rule, granularity="per-tensor")
        mask = build_mask(scope, config)
        model = vector(settings, method).model
        found = {
            name.removeprefix("base_model.model.") + ".weight": module
            for name, module in model.named_modules()
            if hasattr(module, "supertuning_values")
        }
        assert set(found) == set(mask.positions)
        for name, module in found.items():
            (buffer,) = [b for key, b in module.named_buffers() if "indices" in key]
            assert set(buffer.tolist()) <= set(mask.positions[name].tolist())
            assert len(buffer) >= len(mask.positions[name]) - 1  # they round down in float


# -- the mask by gradient ------------------------------------------------------------------------


def test_the_gradient_mask_holds_the_entries_of_the_largest_gradient_and_leaves_no_trace(
    experiment: Any, data: FederatedData
) -> None:
    settings = experiment()
    backbone = load_for_task(settings.backbone, data.task, device="cpu")
    before = {name: p.detach().clone() for name, p in backbone.model.named_parameters()}
    mask = gradient_mask(backbone, data, 0.05, seed=1)
    assert all(torch.equal(before[n], p) for n, p in backbone.model.named_parameters())
    assert not any(p.requires_grad or p.grad is not None for p in backbone.model.parameters())
    scope = maskable_weights(backbone.model, backbone.head)
    assert mask.num_values == int(0.05 * sum(weight.numel() for weight in scope.values()))
    weights = {name: backbone.model.get_parameter(name).requires_grad_() for name in scope}
    rows = np.concatenate([client.rows for client in data.clients])  # fewer than 256: all of them
    batch = data.train.batch(rows)
    torch.nn.functional.cross_entropy(
        backbone.model(**{k: v for k, v in batch.items() if k != "labels"}).logits,
        batch["labels"].long(),
    ).backward()
    scores = {name: weight.grad.abs().flatten() for name, weight in weights.items()}
    inside = torch.cat([scores[name][chosen] for name, chosen in mask.positions.items()])
    everything = torch.cat(list(scores.values()))
    assert inside.mean() > 3 * everything.mean()
    assert inside.min() > everything.median()


def test_the_positions_of_a_gradient_mask_are_in_the_plan_that_is_paid_for(
    experiment: Any,
) -> None:
    changes = {"structure_preset": "none", "strategy_num_rounds": 1}
    shared, drawn = (run_here(experiment(**changes), runs) for runs in ("fedpet", GRADIENT))
    assert drawn["model"]["mask_values"] == shared["model"]["mask_values"]
    more = [r["communication"]["plan_bytes_per_client"] for r in (drawn, shared)]
    assert more[0] > more[1] + 0.2 * shared["model"]["mask_values"] / 8


def test_training_that_diverges_everywhere_is_told_from_a_run_that_cannot_be(
    experiment: Any,
) -> None:
    fast = experiment(training_learning_rate=1e30, training_optimizer="sgd", training_clip_norm=0)
    with pytest.raises(DivergedError, match=r"lower training.learning-rate"):
        run_here(fast, "full")
    with pytest.raises(RunError, match=r"training.cls-only needs") as refused:
        run_here(experiment(**{"training_cls-only": True}), "supertuning")
    assert not isinstance(refused.value, DivergedError)


def test_an_unknown_method_is_refused_with_the_known_ones(experiment: Any) -> None:
    with pytest.raises(ConfigError, match=r"unknown method 'prompt'.*gradient-mask.*ffa-lora"):
        run_here(experiment(), "prompt")
