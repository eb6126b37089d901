"""Show the end of a run in the terminal: quality, bytes, time.

In:  what `result.json` holds.
Out: a Rich table that reads in 80 columns, in a terminal and in a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType

from fedpet.report.facts_table import facts_table
from fedpet.report.number_format import (
    show_baseline,
    show_count,
    show_percent,
    show_predicted,
    show_ratio,
)
from fedpet.utils.formatting import format_bytes, show_seconds, show_spread

__all__ = ["run_table"]

MAX_REFUSALS = 3  # shown in full; the others are in result.json

Row = tuple[str, str]
# By the method that a structure's file states; others were chosen by hand.
_STRUCTURES = {"s3pet": "searched structure", "random": "random structure"}


def run_table(result: Mapping[str, Any]) -> RenderableType:
    """Show one run.

    Args:
        result: The content of `result.json`, schema 1.
    """
    run = result["run"]
    title = f"{run['experiment']}: {run['method']}, {run['backbone']}, seed {run['seed']}"
    if "codec" in run:
        title += f", {run['codec']}"
    parts = (_quality, _values, _bytes, _time, _trouble)
    return facts_table(title, (part(result) for part in parts))


def _quality(result: Mapping[str, Any]) -> Iterator[Row]:
    quality, data = result["quality"], result["data"]
    metric, tokens = quality["metric"], ""
    if "evaluation_label_tokens" in data:
        tokens = f", {data['evaluation_label_tokens']:,} label tokens"
    if quality["before"] is not None:
        yield (
            f"{metric} before",
            f"{quality['before']:.4f}   ({_where(data)}{tokens})",
        )
    rounds = max((point["round"] for point in quality["by_round"]), default=0)
    yield (
        f"{metric} after",
        f"{quality['final']:.4f}   ({_rounds(result, rounds)}, {data['clients']:,} clients)",
    )
    for name, spreads in (quality.get("on_clients") or {}).items():
        yield f"  on clients, {name}", show_spread(spreads[-1])
    if spread := quality.get("by_client"):
        yield (
            f"{metric} by client",
            f"mean {spread['mean']:.4f}, worst tenth {spread['worst_decile']:.4f}   "
            f"({spread['clients']:,} clients)",
        )
    if "majority_baseline" in quality:  # the result of an older fedpet has none
        yield "majority baseline", show_baseline(quality)
    if quality.get("predicted"):
        yield "predicted", show_predicted(quality["predicted"])


def _where(data: Mapping[str, Any]) -> str:
    rows = data["evaluation_rows"]
    return f"{rows:,} evaluation rows" if rows else "on the clients' own rows"


def _rounds(result: Mapping[str, Any], rounds: int) -> str:
    """Say how many rounds there were, and which one's model is the run's."""
    kept = result["run"].get("kept")
    return f"{rounds} rounds" if kept is None else f"round {kept['round']} of {kept['of']} kept"


def _values(result: Mapping[str, Any]) -> Iterator[Row]:
    model = result["model"]
    count = model["communicated_values"]
    everything = model["backbone_parameters"] + model["head_values"]
    yield (
        "values communicated",
        f"{count:,}   ({show_percent(count / everything)} of {show_count(everything)} parameters)",
    )
    kinds = model["values_by_kind"]
    if result["run"]["method"] != "fedpet":
        yield "  by kind", ", ".join(f"{kind} {size:,}" for kind, size in kinds.items())
    else:
        yield from _parts(kinds, model.get("structure_method", ""))
    inexact = model.get("inexact_kinds")
    factors = f"{', '.join(inexact)}: the mean of factors" if inexact else "nothing"
    yield "  not averaged exactly", factors
    if training := result.get("training"):  # the result of an older fedpet has none
        yield "learning rates", _rates(training)
    for tier in model.get("tiers", ()):
        name = f"  tier {tier['density']:g}"
        yield name, f"{tier['values']:,} values, {tier['clients']:,} clients"


def _parts(kinds: Mapping[str, int], method: str) -> Iterator[Row]:
    """Say which part of the values is the mask, the structure, and the head."""
    structure = {kind: size for kind, size in kinds.items() if kind not in ("mask", "head")}
    if "mask" in kinds:
        yield "  mask", f"{kinds['mask']:,}"
    if structure:
        each = ", ".join(f"{kind} {size:,}" for kind, size in structure.items())
        yield f"  {_STRUCTURES.get(method, 'structure')}", f"{sum(structure.values()):,}   ({each})"
    if "head" in kinds:
        yield "  head", f"{kinds['head']:,}"


def _rates(training: Mapping[str, Any]) -> str:
    rates = ", ".join(f"{kind} {rate:g}" for kind, rate in training["learning_rates"].items())
    how = ["auto"] * training["automatic_rates"] + [training["schedule"]]
    return f"{rates}   ({', '.join(how)})"


def _bytes(result: Mapping[str, Any]) -> Iterator[Row]:
    sent = result["communication"]
    yield "up, a client and round", format_bytes(sent["uplink_bytes_per_client_round"])
    yield "down, a client and round", format_bytes(sent["downlink_bytes_per_client_round"])
    yield "plan, a client, once", format_bytes(sent["plan_bytes_per_client"])
    yield (
        "sent in total",
        f"{format_bytes(sent['total_bytes'])}   (up {format_bytes(sent['uplink_bytes'])}, "
        f"down {format_bytes(sent['downlink_bytes'])}, plan {format_bytes(sent['plan_bytes'])})",
    )
    for kind, books in sent.get("by_kind", {}).items():
        yield f"  of {kind}", f"{format_bytes(books['total_bytes'])} in {books['rounds']} rounds"
    yield "dense FedAvg would send", format_bytes(sent["dense_fedavg_total_bytes"])
    yield "ratio", f"{show_ratio(sent['ratio_to_dense'])} of dense FedAvg"


def _time(result: Mapping[str, Any]) -> Iterator[Row]:
    time = result["time"]
    yield (
        "time",
        f"{show_seconds(time['total_seconds'])}   (rounds {show_seconds(time['rounds_seconds'])}, "
        f"evaluation {show_seconds(time['evaluation_seconds'])})",
    )
    outside = time["outside_training_fraction"]
    if outside is not None:
        yield (
            "rounds outside training",
            f"{show_percent(outside)} of local training, from round 2 on",
        )


def _trouble(result: Mapping[str, Any]) -> Iterator[Row]:
    if result["run"]["status"] != "ok":
        yield "status", result["run"]["status"]
    for warning in result["quality"].get("warnings", ()):
        yield "warning", warning
    refused = result["refused"]
    if refused:
        yield "replies refused", f"{len(refused):,}"
    for entry in refused[:MAX_REFUSALS]:
        kind = f"{entry['kind']} " if "kind" in entry else ""
        yield f"  {kind}round {entry['round']}", f"{entry['who']}: {entry['reason']}"
    if len(refused) > MAX_REFUSALS:
        yield "", f"and {len(refused) - MAX_REFUSALS:,} more in result.json"
