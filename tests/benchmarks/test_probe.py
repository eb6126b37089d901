"""The probe is a logistic regression on features that stay as they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.probe import STRENGTHS, fit_logistic, run_probe
from fedpet.errors import ConfigError


def clouds(classes: int, gap: float) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    labels = np.arange(60) % classes
    centres = gap * generator.standard_normal((classes, 8))
    features = centres[labels] + generator.standard_normal((60, 8))
    return features.astype(np.float32), labels


@pytest.mark.parametrize("classes", [2, 5])
def test_separable_classes_are_separated(classes: int) -> None:
    features, labels = clouds(classes, gap=10.0)
    weight, bias = fit_logistic(features, labels, classes, 1e-4)
    assert ((features @ weight.T + bias).argmax(1) == labels).all()


def test_a_stronger_term_gives_smaller_weights_and_a_class_without_rows_is_allowed() -> None:
    features, labels = clouds(2, gap=1.0)
    sizes = [np.abs(fit_logistic(features, labels, 3, s)[0]).sum() for s in (1e-4, 1e-2, 1.0)]
    assert sizes[0] > sizes[1] > sizes[2] > 0


def test_the_fit_is_the_least_loss() -> None:
    features, labels = clouds(2, gap=1.0)
    weight, bias = fit_logistic(features, labels, 2, 0.1)
    logits = features @ weight.T + bias
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    shares[np.arange(60), labels] -= 1
    assert np.abs(shares.T @ features / 60 + 0.1 * weight).max() < 1e-3
    assert np.abs(shares.mean(0)).max() < 1e-3


def test_frozen_features_of_a_model_tell_its_words_apart_and_come_to_the_same_bits(
    experiment: Any,
) -> None:
    first, second = (run_probe(experiment()) for _ in range(2))
    assert first["final_values_sha256"] == second["final_values_sha256"]
    quality = first["quality"]
    assert quality["at_edge"] == (quality["strength"] in (STRENGTHS[0], STRENGTHS[-1]))
    assert quality["final"] == quality["by_feature"][quality["feature"]]
    assert set(quality["by_feature"]) == {"first token", "mean of tokens"}
    assert quality["final"] > quality["majority_baseline"] + 0.1


def test_a_regression_is_refused(experiment: Any) -> None:
    with pytest.raises(ConfigError, match=r"data.task must be classification"):
        run_probe(experiment(data_task="regression", data_metric="pearson"))
