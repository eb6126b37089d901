"""Show an estimate in the terminal: the bytes, and their time on named links.

In:  an `Estimate`.
Out: Rich tables that read in 80 columns, in a terminal and in a file.
"""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedpet.estimate import Estimate
from fedpet.report.facts_table import facts_table
from fedpet.report.number_format import show_count, show_percent, show_ratio
from fedpet.utils.formatting import format_bytes, show_duration

__all__ = ["estimate_table"]

Row = tuple[str, str]


def estimate_table(estimate: Estimate) -> RenderableType:
    """Show an estimate.

    Args:
        estimate: From `fedpet.estimate.estimate`.
    """
    parts: list[RenderableType] = [_facts(estimate)]
    if estimate.links:
        parts += ["", _links(estimate), "", _sources(estimate)]
    parts.append("")
    parts += [Text(note, style="dim") for note in estimate.notes]
    return Group(*parts)


def _facts(estimate: Estimate) -> Table:
    run = estimate.run
    title = f"{run['experiment']}: {run['backbone']}, before any training"
    return facts_table(title, (part(estimate) for part in (_values, _messages, _totals)))


def _values(estimate: Estimate) -> Iterator[Row]:
    model = estimate.model
    count = model["communicated_values"]
    everything = model["backbone_parameters"] + model["head_values"]
    yield "architecture", f"{estimate.run['architecture']}, {show_count(everything)} parameters"
    yield "values communicated", f"{count:,}   ({show_percent(count / everything)})"
    kinds = model["values_by_kind"]
    yield "  by kind", ", ".join(f"{kind} {size:,}" for kind, size in kinds.items())
    if model["tiers"]:
        tiers = (f"{tier['values']:,} ({tier['parts']:,} times)" for tier in model["tiers"])
        yield "  by tier", ", ".join(tiers)


def _messages(estimate: Estimate) -> Iterator[Row]:
    run, message, sent = estimate.run, estimate.message, estimate.communication
    codecs = {"up": run["codec_uplink"], "down": run["codec_downlink"]}
    if run["error_feedback"]:
        codecs["up"] += ", errors fed back"
    if run["downlink"] == "delta":
        codecs["down"] += ", delta"
    for way, name in (("up", "uplink"), ("down", "downlink")):
        whole = sent[f"{name}_bytes_per_client_round"]
        frame = message[f"{way}_frame_bytes"]
        yield (
            f"{way}, a client and round",
            f"{format_bytes(whole)}   ({codecs[way]}, "
            f"{message[f'{way}_bits_per_value']:.2f} bits a value; frame {format_bytes(frame)}, "
            f"framing {format_bytes(whole - frame)})",
        )
    yield "plan, a client, once", format_bytes(sent["plan_bytes_per_client"])


def _totals(estimate: Estimate) -> Iterator[Row]:
    run, sent = estimate.run, estimate.communication
    newcomers = run["newcomers"]
    receivers = f"{newcomers:,}" if run["clients_are_the_data_s"] else f"about {newcomers:,.0f}"
    yield (
        "rounds",
        f"{run['rounds']:,}, of {run['clients_per_round']:,} clients each among "
        f"{run['clients']:,}; {receivers} are sent the plan",
    )
    yield (
        "sent in total",
        f"{format_bytes(sent['total_bytes'])}   (up {format_bytes(sent['uplink_bytes'])}, "
        f"down {format_bytes(sent['downlink_bytes'])}, plan {format_bytes(sent['plan_bytes'])})",
    )
    if "evaluation_answers" in sent:
        down, up = sent["evaluation_down_bytes"], sent["evaluation_up_bytes"]
        yield (
            "  clients measure alone",
            f"{sent['evaluation_answers']:,.0f} answers, each {format_bytes(down)} down and "
            f"{format_bytes(up)} up",
        )
    idle, often = sent["idle_bytes_per_node_day"], sent["idle_bytes_per_node_day_polled"]
    yield (
        "a real node, idle",
        f"{format_bytes(idle)} a day beside the above   ({format_bytes(often)} while rounds "
        "follow one another: it asks every 3 s)",
    )
    for name, key in ((f"LoRA, rank {estimate.model['lora_rank']}", "lora"), ("dense FedAvg", "")):
        total = sent["lora_total_bytes" if key else "dense_fedavg_total_bytes"]
        ratio = sent["ratio_to_lora" if key else "ratio_to_dense"]
        yield f"{name} would send", f"{format_bytes(total)}   (this is {show_ratio(ratio)} of it)"


def _links(estimate: Estimate) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="none")
    table.add_column("link", style="cyan", no_wrap=True)
    for header in ("down", "up", "plan", "all rounds", "LoRA, a round", "dense, a round"):
        table.add_column(header, justify="right")
    keys = ("down", "up", "plan", "run", "lora_round", "dense_round")
    for link in estimate.links:
        times = (show_duration(link[f"{key}_seconds"]) for key in keys)
        table.add_row(Text(link["title"]), *times)
    return table


def _sources(estimate: Estimate) -> Table:
    table = Table(
        title=Text("Nominal rates of one undisturbed device, no promises", style="dim"),
        title_justify="left",
        box=None,
        show_header=False,
        pad_edge=False,
    )
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold", style="dim")
    for link in estimate.links:
        rates = (
            f"{show_rate(link['up_bits_per_second'])} up, "
            f"{show_rate(link['down_bits_per_second'])} down; {link['what']}"
        )
        table.add_row(Text(link["title"]), Text("\n".join((rates, *link["sources"]))))
    return table


def show_rate(bits_per_second: float) -> str:
    """Format a bit rate with three significant digits.

    Example:
        >>> show_rate(62_500)
        '62.5 kbit/s'
    """
    if bits_per_second < 999_500:
        return f"{bits_per_second / 1e3:.3g} kbit/s"
    return f"{bits_per_second / 1e6:.3g} Mbit/s"
