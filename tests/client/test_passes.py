"""Passes are cut once for the clients of a message, and each client trains as if alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
from in_process_run import run
from torch import nn

from fedpet.client import node as node_module
from fedpet.client import train_client as client_module
from fedpet.config import Experiment
from fedpet.errors import TrainingError
from fedpet.training import lean_passes as lean_module
from fedpet.training.lean_passes import lean_passes

SETTINGS: tuple[dict[str, Any], ...] = (
    {"training_cls_only": True},
    {"training_cls_only": False, "training_dropout": True},
    {"training_cls_only": True, "mask_tiers": ["0.01=0.5", "0.05=0.5"]},
)


@pytest.mark.parametrize("settings", SETTINGS)
def test_clients_that_share_the_passes_end_with_the_bits_of_those_that_do_not(
    settings: dict[str, Any],
    experiment: Callable[..., Experiment],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shared = run(experiment(strategy_num_rounds=2, **settings))
    monkeypatch.setattr(node_module, "passes_of_all", lambda loaded: nullcontext())
    alone = run(experiment(strategy_num_rounds=2, **settings))
    assert shared["final_values_sha256"] == alone["final_values_sha256"]


def test_hooks_are_put_on_once_a_message_and_taken_off(
    experiment: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    entered: list[nn.Module] = []
    packed = lean_module.packed_tokens

    def noted(model: nn.Module, *given: Any, **options: Any) -> Any:
        entered.append(model)
        return packed(model, *given, **options)

    monkeypatch.setattr(lean_module, "packed_tokens", noted)
    settings = experiment(strategy_num_rounds=2, strategy_evaluate_every=2)
    result = run(settings)
    evaluations = 3  # before, after, and of the plain model
    assert result["communication"]["messages"] == 4
    assert len(entered) <= 2 + evaluations < 2 * settings.strategy.clients_per_round
    assert not lean_module._lean


def test_a_client_that_fails_in_the_middle_leaves_the_passes_to_those_after_it(
    experiment: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    train = client_module.train_rows
    asked = [0]

    def train_rows(*args: Any, after_step: Callable[[], None], **named: Any) -> Any:
        asked[0] += 1
        if asked[0] == 2:
            return train(*args, after_step=stop, **named)
        return train(*args, after_step=after_step, **named)

    def stop() -> None:
        raise TrainingError("no.")

    monkeypatch.setattr(client_module, "train_rows", train_rows)
    first = run(experiment(strategy_num_rounds=1))
    asked[0] = 0
    monkeypatch.setattr(node_module, "passes_of_all", lambda loaded: nullcontext())
    second = run(experiment(strategy_num_rounds=1))
    assert len(first["refused"]) == 1
    assert first["final_values_sha256"] == second["final_values_sha256"]


def test_a_context_within_a_context_of_the_model_adds_no_hook(
    experiment: Callable[..., Experiment],
) -> None:
    from tiny import Silent

    from fedpet.run.prepare import prepare

    prepared = prepare(experiment(), Silent())
    model, rows = prepared.pet.model, prepared.data.train  # type: ignore[union-attr]

    def hooks() -> int:
        return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())

    before = hooks()
    with lean_passes(model, rows):
        within = hooks()
        with lean_passes(model, rows):
            assert hooks() == within
        assert hooks() == within
    assert hooks() == before <= within
