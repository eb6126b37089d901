"""Show a mask in the terminal: its density by layer, and the bytes of its positions.

In:  a mask, the rule that made it, the model it was read off, and its coded size.
Out: a Rich table: densities by layer and by role, bytes against the entropy bound.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import nn

from fedpet.backbone.module_roles import find_target_modules
from fedpet.config import CodecConfig, MaskConfig, TrainingConfig
from fedpet.data import Task
from fedpet.pet.mask import Mask
from fedpet.pet.structure import Structure
from fedpet.protocol.plan import Plan
from fedpet.report.number_format import show_percent
from fedpet.utils.formatting import format_bytes

__all__ = ["Share", "derived_mask_bytes", "entropy_bytes", "mask_shares", "mask_table"]

BAR_CELLS = 24
_EIGHTHS = " ▏▎▍▌▋▊▉█"


@dataclass(frozen=True)
class Share:
    """A group of tensors in scope, and how much of it is chosen."""

    name: str
    entries: int
    chosen: int

    @property
    def density(self) -> float:
        """Fraction of the entries that is chosen."""
        return self.chosen / self.entries


def mask_table(
    mask: Mask, config: MaskConfig, model: nn.Module, coded_bytes: int
) -> RenderableType:
    """Show a mask.

    Args:
        mask: As `build_mask` gave it.
        config: By which rule.
        model: The model it was read off, its weights as in the checkpoint.
        coded_bytes: Size of the explicit broadcast, `fedpet.protocol.plan.encode_mask`.
    """
    layers, roles = mask_shares(mask.sizes, mask.positions, model)
    top = max(share.density for share in [*layers, *roles])
    return Group(
        _facts(mask, config, model, coded_bytes),
        "",
        _densities("layer", layers, top),
        "",
        _densities("role", roles, top),
    )


def mask_shares(
    sizes: Mapping[str, int], positions: Mapping[str, Any], model: nn.Module
) -> tuple[list[Share], list[Share]]:
    """Group the tensors in scope by layer, and by role.

    Args:
        sizes: Entries of every tensor in scope, by parameter name.
        positions: What is chosen of a tensor, anything with a length, by parameter name.
        model: Gives the layers and roles.

    Returns:
        By layer, in the order of the model; by role, in the order in which a layer has them.
    """
    found = {
        f"{position.name}.weight": position
        for position in find_target_modules(model)
        if position.kind in ("linear", "conv1d")
    }
    stacks = {found[name].stack for name in sizes if name in found}
    layers: dict[str, list[str]] = {}
    roles: dict[str, list[str]] = {}
    order = {name: index for index, (name, _) in enumerate(model.named_parameters())}
    for name in sorted(sizes, key=lambda name: order.get(name, len(order))):
        position = found.get(name)
        if position is None:  # a name that the role table does not know
            number = re.search(r"\.(\d+)\.", name)
            layer = f"layer {number[1]}" if number else "outside the layers"
            role = re.sub(r"\d+", "*", name)
        else:
            layer = "outside the layers" if position.layer is None else f"layer {position.layer}"
            role = position.role
            if len(stacks) > 1:
                layer, role = f"{position.stack} {layer}", f"{position.stack} {role}"
        layers.setdefault(layer, []).append(name)
        roles.setdefault(role, []).append(name)

    def add_up(groups: Mapping[str, list[str]]) -> list[Share]:
        return [
            Share(
                group,
                sum(sizes[name] for name in names),
                sum(len(positions.get(name, ())) for name in names),
            )
            for group, names in groups.items()
        ]

    return add_up(layers), add_up(roles)


def entropy_bytes(mask: Mask) -> float:
    """Return the bound of a code that knows each count: sum over tensors of n H(k / n) / 8."""
    return (
        sum(
            size * _entropy_bits(len(mask.positions.get(name, ())) / size)
            for name, size in mask.sizes.items()
        )
        / 8
    )


def derived_mask_bytes(mask: Mask, config: MaskConfig) -> int:
    """Return the bytes that a recomputed mask adds to a plan: rule, density, SHA-256."""

    def plan(rule: MaskConfig | None, sha256: str) -> Plan:
        return Plan(
            fingerprint="0" * 64,
            head_seed=0,
            task=Task("classification", ("0", "1"), "accuracy"),
            max_length=64,
            tokenizer_hash="0" * 64,
            mask=rule,
            mask_sha256=sha256,
            mask_positions=b"",
            structure=Structure(),
            num_values=mask.num_values,
            layout="0" * 64,
            codec=CodecConfig(),
            training=TrainingConfig(),
            num_rounds=1,
            seed=0,
        )

    return len(plan(config, mask.digest().hex()).to_bytes()) - len(plan(None, "").to_bytes())


def _facts(mask: Mask, config: MaskConfig, model: nn.Module, coded_bytes: int) -> Table:
    entries = sum(mask.sizes.values())
    bound = entropy_bytes(mask)
    over = coded_bytes / bound - 1 if bound else 0.0
    parameters = dict(model.named_parameters())
    magnitudes = [
        parameters[name].detach().float().abs().flatten()[chosen.to(parameters[name].device)]
        for name, chosen in mask.positions.items()
    ]
    least = min(float(values.min()) for values in magnitudes)
    most = max(float(values.max()) for values in magnitudes)
    table = Table(box=box.SIMPLE, show_edge=False, show_header=False, pad_edge=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    rows = (
        ("rule", f"{config.rule}, {config.granularity}, density {config.density:g}"),
        ("values", f"{mask.num_values:,} of {entries:,} entries in {len(mask.sizes):,} tensors"),
        ("magnitude, largest", f"{most:.3g}   (smallest {least:.3g})"),
        (
            "explicit, coded",
            f"{format_bytes(coded_bytes)}   ({8 * coded_bytes / mask.num_values:.2f} bits a value; "
            f"entropy {format_bytes(bound)}, {'+' if over >= 0 else ''}{show_percent(over)})",
        ),
        (
            "derived",
            f"{format_bytes(derived_mask_bytes(mask, config))}   (rule and hash; the device builds "
            "the mask itself)",
        ),
    )
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    return table


def _densities(what: str, shares: Sequence[Share], top: float) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="none")
    table.add_column(what, style="cyan", overflow="fold")
    for header in ("entries", "chosen", "density"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for name, entries, chosen, density, picture in _lines(shares, top):
        table.add_row(Text(name), entries, chosen, density, Text(picture, style="cyan"))
    return table


def _lines(shares: Iterable[Share], top: float) -> Iterable[tuple[str, str, str, str, str]]:
    for share in shares:
        yield (
            share.name,
            f"{share.entries:,}",
            f"{share.chosen:,}",
            show_percent(share.density),
            bar(share.density / top if top else 0.0),
        )


def bar(fraction: float) -> str:
    """Draw a bar of block characters, full at `BAR_CELLS` cells."""
    eighths = round(8 * BAR_CELLS * min(max(fraction, 0.0), 1.0))
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _entropy_bits(p: float) -> float:
    if p <= 0 or p >= 1:
        return 0.0
    return -p * math.log2(p) - (1 - p) * math.log2(1 - p)
