"""How a search goes: one frozen dataclass, and the preset that follows the paper's code.

In:  what a user chose.
Out: a `SearchConfig`.

Source: S3PET (Hu et al., NeurIPS 2022, arXiv:2206.07382), released code: `SearchConfig.faithful`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from fedpet.errors import ConfigError

__all__ = ["SearchConfig", "budget_values"]

VIRTUAL_STEPS = ("adamw", "adamw-exact", "sgd")


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Everything that decides a search, beside the rows and the backbone."""

    space: str = "mergeable"  # or s3pet-mix, s3pet-lora
    rank: int = 1  # of LoRA, HiWi and the adapter's factors
    scale: float = 16.0  # of LoRA; the paper's alpha of 16 at rank 1
    budget: float = 0.0  # values the chosen structure may send; the head is not counted
    epochs: int = 5  # over half of the rows
    max_steps: int = 0  # ends the search, and the fall of the rates, earlier; 0 goes by epochs
    batch_size: int = 32
    rate: float = 3e-4  # of the candidates' values
    head_rate: float = 0.0  # of the head and the mask; 0 takes `rate`
    alpha_rate: float = 0.1
    clip_norm: float = 2.0  # of both gradients; 0 leaves them alone
    beta: float = 1.0  # temperature at the start
    beta_end: float = 0.0  # falls geometrically to this; 0 keeps beta, as in the paper
    order: str = "second"  # "first" is a deviation: no unrolled step
    virtual: str = "adamw"  # the unrolled step; see fedpet/search/bilevel.py
    hard: bool = False  # gates of 0 and 1 with a straight-through gradient
    dropout: bool = False  # the paper has it on
    validation_fraction: float = 0.1  # of the rows; picks the checkpoint
    evaluate_every: int = 50  # steps; the last is always evaluated
    checkpoint: str = "best"  # by validation, as in the paper; or "last"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("order", ("second", "first")),
            ("virtual", VIRTUAL_STEPS),
            ("checkpoint", ("best", "last")),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"a search's {name} must be one of {', '.join(allowed)}, got "
                    f"{getattr(self, name)!r}."
                )
        for name in ("rank", "epochs", "batch_size", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"a search's {name} must be at least 1, got {getattr(self, name)!r}."
                )
        for name in ("rate", "alpha_rate", "beta"):
            if not getattr(self, name) > 0:
                raise ConfigError(
                    f"a search's {name} must be above 0, got {getattr(self, name)!r}."
                )
        for name in ("max_steps", "head_rate", "clip_norm", "beta_end"):
            if not getattr(self, name) >= 0:
                raise ConfigError(
                    f"a search's {name} must be at least 0, got {getattr(self, name)!r}."
                )
        if not 0 < self.validation_fraction < 1:
            raise ConfigError(
                f"a search's validation_fraction must be in (0, 1), got "
                f"{self.validation_fraction!r}. It is the fraction of the rows that picks the "
                "checkpoint."
            )

    @classmethod
    def faithful(cls, **changes: Any) -> SearchConfig:
        """The paper's own settings: its mixed space, AdamW unrolled, dropout, fixed temperature."""
        return cls(**{"space": "s3pet-mix", "dropout": True, **changes})

    @property
    def deviations(self) -> tuple[str, ...]:
        """What leaves the paper's procedure, in words for a report."""
        found = {
            "first-order gradient of alpha": self.order == "first",
            f"unrolled step {self.virtual}": self.order == "second" and self.virtual != "adamw",
            "temperature falls": bool(self.beta_end) and self.beta_end != self.beta,
            "gates of 0 and 1 in the search": self.hard,
            "no dropout": not self.dropout,
            "last checkpoint": self.checkpoint == "last",
            f"space {self.space}": not self.space.startswith("s3pet"),
        }
        return tuple(text for text, holds in found.items() if holds)


_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "KiB": 2**10, "MiB": 2**20}


def budget_values(text: str, *, backbone_parameters: int, bytes_per_value: float = 4.0) -> int:
    """Read a budget: values, a fraction of the backbone, or bytes a round.

    Args:
        text: "2000" values; "0.0001", below 1, of the backbone's parameters; "8kB" in a
            client's upload.
        backbone_parameters: Of the pretrained model, its new head not counted.
        bytes_per_value: What the uplink's codec makes of a value.

    Raises:
        ConfigError: None of the three.

    Example:
        >>> budget_values("0.0001", backbone_parameters=22_713_216)
        2271
    """
    match = re.fullmatch(r"\s*([0-9.eE+-]+)\s*([A-Za-z]*)\s*", text)
    try:
        number = float(match[1]) if match else 0.0
    except ValueError:
        number = 0.0
    unit = match[2] if match else ""
    if not 0 < number < float("inf") or (unit and unit not in _UNITS):
        raise ConfigError(
            f"a budget must be a number of values (2000), a fraction of the backbone below 1 "
            f"(0.0001), or bytes a client and round ({', '.join(_UNITS)}: 8kB), got {text!r}."
        )
    if unit:
        return int(number * _UNITS[unit] / bytes_per_value)
    return int(number * backbone_parameters) if number < 1 else int(number)
