"""Write the model card of a folder: what was trained on what, its figures, its bytes.

The card has no row of anybody's data and no path of a machine. A licence that is not known is left
out: it follows from the checkpoint's and from the data's.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedpet import __version__
from fedpet.backbone.checkpoint import package_name
from fedpet.config import Experiment, TrainingConfig
from fedpet.export.plain_model import no_room
from fedpet.tasks import kind_of
from fedpet.utils import bundled
from fedpet.utils.atomic_write import atomic_write
from fedpet.utils.paths import expand
from fedpet.utils.templating import render

__all__ = ["CARD_FILE", "hub_name", "write_adapter_card", "write_card"]

CARD_FILE = "README.md"
_TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"


def write_card(
    folder: Path,
    experiment: Experiment,
    result: Mapping[str, Any],
    *,
    peft_type: str = "",
    notes: Sequence[str] = (),
) -> None:
    """Write the card of what a run has trained.

    Args:
        folder: Holds the model.
        experiment: The run's.
        result: What `result.json` holds.
        peft_type: Of an adapter; "" for a plain model.
        notes: What whoever loads an adapter must know, in sentences.

    Raises:
        RunError: The disk does not take it.
    """
    base, quality = hub_name(experiment.backbone.model), result["quality"]
    classes = [one["name"] for one in result["data"]["classes"]]
    strategy, training = experiment.strategy, experiment.training
    kind = kind_of(experiment.data.task)
    _write(
        folder,
        base,
        peft_type=peft_type,
        notes=notes,
        metric=quality["metric"],
        score=quality["final"],
        dataset=hub_name(experiment.data.source),
        pipeline="" if peft_type else kind.pipeline,
        task_type=kind.pipeline,
        model_class=kind.model_class,
        model_arguments=f", num_labels={max(len(classes), 1)}" if kind.has_head else "",
        name=result["run"]["experiment"],
        result=True,
        versions=result["run"]["versions"],
        evaluation_rows=f"{result['data']['evaluation_rows']:,}",
        final=_number(quality["final"]),
        before=_number(quality["before"]),
        majority=_number(quality.get("majority_baseline")),
        warnings=quality["warnings"],
        clients=result["data"]["clients"],
        rounds_sentence=(
            f"In {_count(strategy.num_rounds, 'round')} of {strategy.name}, "
            f"{_count(strategy.clients_per_round, 'client')} each, they trained "
            f"{_count(training.local_epochs, 'epoch')} a round."
        ),
        values_by_kind=result["model"]["values_by_kind"],
        backbone_parameters=result["model"]["backbone_parameters"],
        communicated_values=result["model"]["communicated_values"],
        communication=result["communication"],
        settings={
            "task": experiment.data.task,
            "optimizer": training.optimizer,
            "learning rate": _rates(result, training),
            "batch size": training.batch_size,
            "tokens a row, at most": experiment.data.max_length,
            "codec up, down": f"{experiment.codec.uplink}, {experiment.codec.downlink}",
            "seed": result["run"]["seed"],
            "fingerprint of the checkpoint": f"`{result['run']['fingerprint']}`",
            "final values, SHA-256": f"`{result['final_values_sha256']}`",
        },
        labels=classes if kind.has_classes else [],
        versions_sentence=_listed(result["run"]["versions"]),
    )


def write_adapter_card(
    folder: Path, source: str, *, peft_type: str, notes: Sequence[str] = (), name: str = ""
) -> None:
    """Write the card of an adapter of which no result is at hand; arguments as of `write_card`.

    Its name is the folder's where none is given.
    """
    versions = {"fedpet": __version__}
    for package in ("torch", "transformers"):
        versions[package] = importlib.metadata.version(package)
    _write(
        folder,
        hub_name(source),
        peft_type=peft_type,
        notes=notes,
        name=name or folder.name,
        result=False,
        versions=versions,
        labels=[],
        versions_sentence=_listed(versions),
    )


def hub_name(source: str) -> str:
    """Return a model's or data set's name on the Hugging Face Hub; "" for what is local."""
    if package := package_name(source):
        return bundled.HUB_NAME if package == bundled.name_of(bundled.MODEL) else ""
    local = source.startswith((".", "~", "/")) or source.count("/") > 1 or expand(source).exists()
    return "" if local or "\\" in source else source


def _write(
    folder: Path,
    base: str,
    *,
    peft_type: str,
    metric: str = "",
    score: float | None = None,
    dataset: str = "",
    pipeline: str = "",
    task_type: str = "",
    **facts: Any,
) -> None:
    from huggingface_hub import EvalResult, ModelCardData

    measured = None
    if _number(score):
        measured = [
            EvalResult(
                task_type=task_type,
                dataset_type=dataset or "private",
                dataset_name=dataset or "held-out rows",
                metric_type=metric,
                metric_value=score,
            )
        ]
    data = ModelCardData(
        base_model=base or None,
        base_model_relation=("adapter" if peft_type else "finetune") if base else None,
        library_name="peft" if peft_type else "transformers",
        pipeline_tag=pipeline or None,
        datasets=dataset or None,
        metrics=[metric] if metric else None,
        tags=["fedpet", "federated-learning", *([peft_type.lower()] if peft_type else [])],
        model_name=facts["name"],
        eval_results=measured,
    )
    what = f"an adapter of peft ({peft_type}) for" if peft_type else "a plain model, made from"
    card = render(
        _TEMPLATE,
        card_data=data.to_yaml(),
        opening=f"This is {what} {f'`{base}`' if base else 'a local checkpoint'}.",
        base_text=repr(base) if base else '"the checkpoint"',
        is_adapter=bool(peft_type),
        metric=metric,
        **facts,
    )
    try:
        atomic_write(folder / CARD_FILE, card)
    except OSError as error:
        raise no_room(folder / CARD_FILE, error) from None


def _number(value: float | None) -> str:
    """Format four digits; "" for none, and for NaN."""
    return "" if value is None or value != value else f"{value:.4f}"


def _rates(result: Mapping[str, Any], training: TrainingConfig) -> str:
    """Name the rate of each kind; of a result that does not, the experiment's."""
    rates = result.get("training", {}).get("learning_rates", {})
    if len(set(rates.values())) > 1:
        return ", ".join(f"{kind} {rate:g}" for kind, rate in rates.items())
    return str(next(iter(rates.values()), training.learning_rate))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _listed(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items()) + "."
