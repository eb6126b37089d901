"""Judge a run: its metric by round, a baseline to compare it with, and warnings.

In:  the rounds' records and the assessment of the final model.
Out: "quality" of `result.json`, and the run's status.

A run can come to an average in every round and learn nothing: at a rate that is too high the model
ends with one answer for all rows. Each warning states the sign of that which was seen, and what to
try.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedpet.config import Experiment, StrategyConfig, TrainingConfig
from fedpet.config.value_checks import rates_by_kind
from fedpet.errors import RunError
from fedpet.protocol.ledger import RoundRecord
from fedpet.training.metrics import Assessment, greater_is_better

__all__ = ["DIVERGED", "quality_of", "refuse_diverged", "status_of"]

OK, NOTHING_LEARNED, DIVERGED = "ok", "nothing learned", "diverged"
LAST_NOT_AVERAGED = "last round not averaged"


def status_of(rounds: Sequence[RoundRecord], final: Assessment) -> str:
    """Name how a run ended; what is not "ok" fails, with exit code 1.

    "nothing learned" where no round came to an average, "diverged" where the final metric is NaN,
    "last round not averaged" where the last one came to none, else "ok".
    """
    if not any(record.aggregated for record in rounds):
        return NOTHING_LEARNED
    if math.isnan(final.value):
        return DIVERGED
    return OK if rounds[-1].aggregated else LAST_NOT_AVERAGED


def refuse_diverged(result: Mapping[str, Any]) -> None:
    """End a run that diverged.

    Raises:
        RunError: With the first warning, which says what to try.
    """
    if result["run"]["status"] == DIVERGED:
        raise RunError(f"the run diverged: {result['quality']['warnings'][0]}")


def quality_of(
    experiment: Experiment,
    rounds: Sequence[RoundRecord],
    final: Assessment,
    *,
    metric: str,
    num_rows: int,
    trained_kinds: Sequence[str] | None = None,
    training: TrainingConfig | None = None,
    measured: Sequence[tuple[int, float]] | None = None,
) -> dict[str, Any]:
    """Make "quality" of `result.json`.

    Args:
        experiment: What was run.
        rounds: Of training, round 0 first where it was evaluated.
        final: The final model's.
        metric: Of the task, by name.
        num_rows: Evaluation rows.
        trained_kinds: Kinds of modules that have values; None where they have other names, as a
            baseline's have. Rates for other kinds are told, unless a search chose the modules.
        training: As it was in force; None is the experiment's.
        measured: The metric by round, of clients; None takes the server's from the records.
    """
    if measured is None:
        measured = [(record.round, record.metric) for record in rounds if record.metric is not None]
    before = measured[0][1] if measured and measured[0][0] == 0 else None
    losses = [
        (record.round, record.loss)
        for record in rounds
        if record.aggregated and record.loss is not None
    ]
    later = [value for number, value in measured if number > 0]
    best = max if greater_is_better(metric) else min
    warnings: list[str] = []
    if experiment.run.evaluation_dtype != "float32":
        warnings.append(
            f"outputs were computed in {experiment.run.evaluation_dtype} (run.evaluation-dtype): a "
            "row that lies between two answers may get another than in float32."
        )
    if status_of(rounds, final) != NOTHING_LEARNED:
        lower = _lower_rates(training or experiment.training, experiment.strategy)
        warnings += _warnings(metric, before, later, losses, final, num_rows, lower)
        if trained_kinds is not None and not experiment.search.federated:
            warnings += _unused_rates(experiment, trained_kinds)
    return {
        "metric": metric,
        "dtype": experiment.run.evaluation_dtype,
        **_baseline(final),
        "before": before,
        "final": final.value,
        "metrics": dict(final.metrics),
        "best": best([v for v in (final.value, *later) if not math.isnan(v)], default=math.nan),
        "by_round": [{"round": number, "value": value} for number, value in measured],
        "loss_by_round": [{"round": number, "value": value} for number, value in losses],
        "predicted": dict(final.predicted),
        "by_class": {
            name: {"rows": rows, "predicted": answers, "correct": hits}
            for name, (rows, answers, hits) in final.by_class.items()
        },
        "by_client": dict(final.by_client),
        "warnings": warnings,
    }


def _baseline(final: Assessment) -> dict[str, Any]:
    """Return the majority's metric and class, of a task that has one."""
    if final.majority_baseline is None:
        return {}
    return {
        "majority_baseline": final.majority_baseline,
        "majority_class": final.majority_class,
    }


def _warnings(
    metric: str,
    before: float | None,
    later: Sequence[float],
    losses: Sequence[tuple[int, float]],
    final: Assessment,
    num_rows: int,
    lower: str,
) -> Iterator[str]:
    value = final.value
    if math.isnan(value):
        yield f"the final {metric} is NaN, outputs of the model are not finite: {lower}."
    elif count := sum(map(math.isnan, later)):
        yield (
            f"the {metric} was NaN at {count} of {len(later)} evaluations, outputs of the model "
            f"were not finite: {lower}."
        )
    if final.is_constant:
        answer = "the same value"
        if final.predicted:
            answer = f"the class {max(final.predicted, key=lambda c: final.predicted[c])!r} alone"
        yield (
            f"the model predicts {answer} for all {num_rows:,} evaluation rows: {lower}; if the "
            "loss still falls, train longer (strategy.num-rounds)."
        )
    up = greater_is_better(metric)
    sign, moved, side = (1, "fell", "above") if up else (-1, "rose", "below")
    if before is not None and sign * value < sign * before:
        yield f"{metric} {moved} from {before:.4f} before training to {value:.4f}: {lower}."
    if losses and losses[-1][1] > losses[0][1]:
        (first, at_first), (last, at_last) = losses[0], losses[-1]
        yield (
            f"the mean training loss rose from {at_first:.4g} in round {first} to {at_last:.4g} in "
            f"round {last}: {lower}."
        )
    baseline = final.majority_baseline
    if baseline is not None and sign * value <= sign * baseline:
        known = f"the class {final.majority_class!r}" if final.majority_class else "one value"
        yield (
            f"{metric} {value:.4f} is not {side} the majority baseline "
            f"{baseline:.4f}, which answers {known} for every row: {lower}, or "
            "train longer (strategy.num-rounds, training.local-epochs)."
        )


def _lower_rates(training: TrainingConfig, strategy: StrategyConfig) -> str:
    """Name the rates that this run has, and their values."""
    rates = []
    if not training.has_auto_rates:  # else all stand in learning-rates
        rates.append(f"training.learning-rate = {training.learning_rate:g}")
    if training.learning_rates:
        rates.append(f"training.learning-rates = {list(training.learning_rates)}")
    if (server_rate := getattr(strategy, "server_learning_rate", None)) is not None:
        rates.append(f"strategy.server-learning-rate = {server_rate:g}")
    return f"try lower rates ({', '.join(rates)})"


def _unused_rates(experiment: Experiment, trained_kinds: Sequence[str]) -> Iterator[str]:
    """Say which rates belong to a kind that has no values in this run."""
    key = "training.learning-rates"
    for kind in rates_by_kind(experiment.training.learning_rates, key):
        if kind not in trained_kinds:
            yield (
                f"{key} names {kind!r}, of which this run trains nothing ("
                f"{', '.join(trained_kinds)} are trained): leave it out, or add such modules."
            )
