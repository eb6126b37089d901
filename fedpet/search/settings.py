"""Settle a search: the paper's own settings, deviations from them, and budgets.

In:  a `SearchConfig` (fedpet/config/schema.py).
Out: its deviations from the paper in words, and its budget in values.

Source: S3PET (Hu et al., NeurIPS 2022, arXiv:2206.07382), released code: `faithful`.
"""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from typing import Any

from fedpet.config import SearchConfig, TrainingConfig
from fedpet.config.value_checks import rates_by_kind
from fedpet.errors import ConfigError, StructureError

__all__ = [
    "budget_values",
    "deviations",
    "faithful",
    "reproducible_settings",
    "resolve_settings",
    "temperature",
]

_BATCHES = (15, 16, 32)  # of the paper's tasks, its 5 for the longest texts left out
_NUMBERS = ("learning_rate", "gate_learning_rate", "clip_norm", "beta", "rank", "scale")
_FEDERATED = ("federated", "rounds", "local_steps", "sends", "settled_overlap", "settled_rounds")


def faithful(**changes: Any) -> SearchConfig:
    """Return the paper's own settings: its mixed space and rates, AdamW unrolled, dropout.

    Example:
        >>> deviations(faithful()), deviations(faithful(order="first"))
        ((), ('first-order gradient of alpha',))
    """
    paper: dict[str, Any] = {"space": "s3pet-mix", "learning_rate": 3e-4, "dropout": True}
    return SearchConfig(**{**paper, **changes})


def deviations(
    config: SearchConfig, logit_adjustment: float = 0.0, loss: str = ""
) -> tuple[str, ...]:
    """Name what leaves the paper's procedure, in words for a report.

    Args:
        config: Of the search.
        logit_adjustment: Of its losses, `training.logit-adjustment`.
        loss: Their name, `training.loss`; "" is the task's own.

    Example:
        >>> deviations(faithful(hard=True))
        ('gates of 0 and 1 in the search',)
    """
    found = {
        "first-order gradient of alpha": config.order == "first",
        f"unrolled step {config.virtual}": config.order == "second" and config.virtual != "adamw",
        "temperature falls": bool(config.beta_end) and config.beta_end != config.beta,
        "gates of 0 and 1 in the search": config.hard,
        "no dropout": not config.dropout,
        "last checkpoint": config.checkpoint == "last" or config.federated,
        f"space {config.space}": not config.space.startswith("s3pet"),
        f"candidates of {', '.join(config.kinds)} alone": bool(config.kinds),
        "batches of another size": config.batch_size not in _BATCHES,
        "rates by kind": bool(config.learning_rates),
        f"gates at rest for {config.warmup_steps} steps": config.warmup_steps > 0,
        "all gates open meanwhile": config.warmup_steps > 0 and config.warmup_gates == "open",
        "one scale for all logits' steps": config.gate_optimizer != "adamw",
        "gates compete by gain per value": config.competition != "candidates",
        f"mean alpha of {config.repeats} searches": config.repeats > 1,
        "candidates start from zero each round": config.federated and config.sends == "gates",
        f"logits adjusted by {logit_adjustment:g} for label shares": bool(
            logit_adjustment and not loss
        ),
        f"loss {loss}": bool(loss),
    }
    paper = faithful()
    for name in _NUMBERS:
        value, papers = getattr(config, name), getattr(paper, name)
        if name == "learning_rate" and not value:
            continue  # derived from the model: "rates by kind" says so
        found[f"{name.replace('_', ' ')} {value:g} for {papers:g}"] = value != papers
    return tuple(text for text, holds in found.items() if holds)


def reproducible_settings(config: SearchConfig) -> dict[str, Any]:
    """List the settings that a structure states: those of a federated search where it was one.

    Example:
        >>> "rounds" in reproducible_settings(SearchConfig())
        False
    """
    lists = {name: list(getattr(config, name)) for name in ("kinds", "learning_rates")}
    table = {**asdict(config), **lists}
    if not config.federated:
        for name in _FEDERATED:
            del table[name]
    return table


def temperature(config: SearchConfig, progress: float) -> float:
    """Return beta when a fraction of a search, in [0, 1], is over.

    Example:
        >>> round(temperature(SearchConfig(beta=1.0, beta_end=0.01), 0.5), 6)
        0.1
    """
    first, last = config.beta, config.beta_end
    return float(first * (last / first) ** min(1.0, progress)) if last else first


def resolve_settings(
    config: SearchConfig,
    training: TrainingConfig,
    *,
    backbone_parameters: int,
    bytes_per_value: float = 4.0,
    mask_values: int = 0,
) -> SearchConfig:
    """Fill in what a search takes from the rest of its experiment: its rates, a budget in values.

    Where it names no rate for all kinds, it takes training's, those by kind too; but a kind that
    its own `rates` name keeps that rate. Where training's are "auto" the rate stays 0, and the
    search derives a rate for each kind once it has a model.

    Args:
        config: As the experiment has it.
        training: Whose rates are taken where the search names none.
        backbone_parameters: Of the pretrained model, its new head not counted.
        bytes_per_value: What the uplink's codec makes of a value.
        mask_values: Taken off the budget where it holds them too.

    Raises:
        ConfigError: The budget does not read.
        StructureError: The mask alone is as large as the budget.

    Example:
        >>> ready = resolve_settings(
        ...     SearchConfig(budget=0.001), TrainingConfig(learning_rate=0.01),
        ...     backbone_parameters=10**6)
        >>> ready.budget, ready.learning_rate
        (1000, 0.01)
    """
    budget = budget_values(
        config.budget, backbone_parameters=backbone_parameters, bytes_per_value=bytes_per_value
    )
    if config.mask_in_budget:
        if budget <= mask_values:
            raise StructureError(
                f"the budget of {budget} values must hold the mask and a structure, and the mask "
                f"alone has {mask_values}. Raise search.budget, lower mask.density, or set "
                "search.mask-in-budget = false."
            )
        budget -= mask_values
    if not config.learning_rate:
        own = rates_by_kind(config.learning_rates, "search.learning-rates")
        taken = [
            entry
            for entry in training.learning_rates
            if rates_by_kind([entry], "training.learning-rates").keys().isdisjoint(own)
        ]
        rates = (*taken, *config.learning_rates)
        rate = 0.0 if isinstance(training.learning_rate, str) else training.learning_rate
        config = replace(config, learning_rate=rate, learning_rates=rates)
    return replace(config, budget=budget, mask_in_budget=False)


_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "KiB": 2**10, "MiB": 2**20}


def budget_values(
    budget: str | float, *, backbone_parameters: int, bytes_per_value: float = 4.0
) -> int:
    """Read a budget: values, a fraction of the backbone, or bytes a round.

    Args:
        budget: 2000 values; 0.0001, below 1, of the backbone's parameters; "8kB" in a client's
            upload. A number may be a string.
        backbone_parameters: Of the pretrained model, its new head not counted.
        bytes_per_value: What the uplink's codec makes of a value.

    Raises:
        ConfigError: None of the three.

    Example:
        >>> budget_values("0.0001", backbone_parameters=22_713_216)
        2271
    """
    match = re.fullmatch(r"\s*([0-9.eE+-]+?)\s*([A-Za-z]*)\s*", str(budget))
    try:
        number = float(match[1]) if match else 0.0
    except ValueError:
        number = 0.0
    unit = match[2] if match else ""
    if not 0 < number < float("inf") or (unit and unit not in _UNITS):
        raise ConfigError(
            f"a budget must be a number of values (2000), a fraction of the backbone below 1 "
            f"(0.0001), or bytes a client and round ({', '.join(_UNITS)}: 8kB), got {budget!r}."
        )
    if unit:
        return int(number * _UNITS[unit] / bytes_per_value)
    return int(number * backbone_parameters) if number < 1 else int(number)
