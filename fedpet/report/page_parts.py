"""Gather the parts of a page: the texts, plots, tables and heat maps that its template shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

import fedpet
from fedpet.config import Experiment
from fedpet.config.strategy_registry import registered_rules
from fedpet.report.client_spread_table import client_spread
from fedpet.report.comparison import columns_of, notes
from fedpet.report.curves import KINDS
from fedpet.report.gate_tables import MARK, gate_map, structure_facts
from fedpet.report.loading import Report
from fedpet.report.number_format import show_baseline, show_percent, show_ratio, show_value
from fedpet.report.placement import Cell, Grid
from fedpet.report.plots import bytes_svg, metric_svg, progress_svg
from fedpet.report.refusals import count_refusals
from fedpet.utils.formatting import format_bytes, show_seconds

__all__ = ["Heat", "HeatCell", "gate_heat", "page_parts"]

FULLEST = 0.6  # fraction of a full cell's colour: text on it must stay readable
SOME = 8  # names that a cell shows
MAX_CLASSES = 100  # rows of the table by class; the rarest are left out above
WAYS = ("up", "down", "plan")

Parts = dict[str, Any]


@dataclass(frozen=True)
class HeatCell:
    """A cell: its text, the share of the full colour, its words under the pointer, its class."""

    text: str
    share: str
    title: str
    kind: str = ""


@dataclass(frozen=True)
class Heat:
    """A heat map: the heads of its columns, and rows of a name and cells; None is no cell."""

    heads: Sequence[str]
    rows: Sequence[tuple[str, Sequence[HeatCell | None]]]


def page_parts(report: Report) -> Parts:
    """Return everything that the template `page.html.jinja` names, but its style."""
    result = report.result
    run, quality = result["run"], result["quality"]
    return {
        "run": run,
        "title": f"{run['experiment']}: {run['method']}, seed {run['seed']}",
        "subtitle": _subtitle(report),
        "troubles": [
            *([] if run["status"] == "ok" else [run["status"]]),
            *quality.get("warnings", ()),
        ],
        "key_figures": list(_key_figures(result)),
        "metric_title": quality["metric"][:1].upper() + quality["metric"][1:],
        "legend": sorted({(line.number, line.group) for line in report.lines}),
        "metric_plot": Markup(metric_svg(report.lines, quality["metric"], prefix="metric")),
        "any_spread": any(not line.curve.exact for line in report.lines),
        "comparisons": list(_comparisons(report)),
        "classes": _classes(quality),
        "clients": _clients(quality),
        "own_rows": client_spread(quality),
        "rounds": _rounds(report),
        "generations": [
            tuple(entry.get(key, "") for key in ("prompt", "wanted", "before", "after"))
            for entry in report.generations
        ],
        "bytes_legend": [
            (name, f"{name} {format_bytes(result['communication'][kind])}")
            for kind, name in zip(KINDS, WAYS, strict=True)
        ],
        "stages": list(_stages(result["time"])),
        "values_by_kind": _values_by_kind(result["model"]["values_by_kind"]),
        "mask_map": None if report.places.mask is None else _density_map(report.places.mask),
        "mask_left_out": report.places.left_out,
        "structure_map": _structure_map(report.places.structure),
        "gates": _gates(report),
        "refused": _refused(result["refused"]),
        "events": [  # of a deployment's nodes; older results have none
            (event["round"], event["node"], event["event"], event["details"])
            for event in result.get("events", ())
        ],
        "settings": _settings(report.config),
        "provenance": list(_provenance(report)),
        "versions": ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
        "fedpet_version": fedpet.__version__,
    }


def _subtitle(report: Report) -> str:
    run, data = report.result["run"], report.result["data"]
    parts = [
        f"{run['method']} on {report.checkpoint}",
        f"{data['clients']:,} clients with {data['train_rows']:,} rows",
        f"{data['evaluation_rows']:,} rows to evaluate on"
        if data["evaluation_rows"]
        else "evaluated on the clients' own rows",
        f"seed {run['seed']}",
        *([run["codec"]] if "codec" in run else []),
        *([report.date[:10]] if report.date else []),
    ]
    return ", ".join(parts)


def _key_figures(result: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield name, value and a note."""
    quality, model, sent = result["quality"], result["model"], result["communication"]
    before = quality["before"]
    compared = [f"before training {before:.4f}"] if before is not None else []
    if "majority_baseline" in quality:  # the result of an older fedpet has none
        compared.append(f"majority baseline {show_baseline(quality)}")
    if kept := result["run"].get("kept"):
        compared.insert(0, f"round {kept['round']} of {kept['of']} kept")
    yield quality["metric"], f"{quality['final']:.4f}", ", ".join(compared)
    yield (
        "of dense FedAvg's bytes",
        show_ratio(sent["ratio_to_dense"]),
        f"{format_bytes(sent['dense_fedavg_total_bytes'])} by formula",
    )
    rounds = max((point["round"] for point in quality["by_round"]), default=0)
    yield (
        "sent in total",
        format_bytes(sent["total_bytes"]),
        f"in {rounds} rounds, plan included{_of_search(sent)}",
    )
    share = model["communicated_values"] / (model["backbone_parameters"] + model["head_values"])
    yield (
        "values communicated",
        f"{model['communicated_values']:,}",
        f"{show_percent(share)} of the parameters",
    )
    yield "up, a client and round", format_bytes(sent["uplink_bytes_per_client_round"]), ""
    yield "down, a client and round", format_bytes(sent["downlink_bytes_per_client_round"]), ""
    yield "plan, a client, once", format_bytes(sent["plan_bytes_per_client"]), ""
    time = result["time"]
    yield (
        "time",
        show_seconds(time["total_seconds"]),
        f"rounds {show_seconds(time['rounds_seconds'])}",
    )


def _of_search(sent: Mapping[str, Any]) -> str:
    search = sent.get("by_kind", {}).get("search")
    if search is None:
        return ""
    return f"; {format_bytes(search['total_bytes'])} of it in {search['rounds']} rounds of a search"


def _comparisons(report: Report) -> Iterator[Parts]:
    """Yield a table for each question, which is the plot's legend as well."""
    for question in dict.fromkeys(row.group.question for row in report.rows):
        rows = [row for row in report.rows if row.group.question == question]
        columns = columns_of(rows)
        yield {
            "title": rows[0].group.title,
            "heads": ["", *(name for name, _ in columns)],
            "rows": [
                (
                    report.numbers[row.group.title, row.group.name],
                    row.group.name,
                    [show(row) for _, show in columns],
                )
                for row in rows
            ],
            "notes": list(notes(rows)),
        }


def _classes(quality: Mapping[str, Any]) -> Parts | None:
    """Make the table by class; recall and precision stand there where the result has counts."""
    predicted: Mapping[str, float] = quality.get("predicted") or {}
    if not predicted:
        return None
    counts = quality.get("by_class") or {}
    majority = quality.get("majority_class")
    names = list(predicted)
    marked = [f"{name} (majority)" if name == majority else name for name in names]
    heads, rows = ["class", "predicted"], [[name] for name in marked]
    if set(counts) == set(names):
        heads[1:1] = ["rows", "recall", "precision"]
        for name, row in zip(names, rows, strict=True):
            of_class, answers, hits = (counts[name][k] for k in ("rows", "predicted", "correct"))
            row += [f"{of_class:,}", _ratio(hits, of_class), _ratio(hits, answers)]
    for row, share in zip(rows, predicted.values(), strict=True):
        row.append(show_percent(share))
    note = f"Final model. {quality['metric']} {quality['final']:.4f}"
    if "majority_baseline" in quality:
        note += f"; of the majority class for every row {show_baseline(quality)}"
    if len(rows) > MAX_CLASSES:
        note += f". {len(rows) - MAX_CLASSES} more classes in result.json"
    return {"heads": heads, "rows": rows[:MAX_CLASSES], "note": f"{note}."}


def _ratio(part: int, whole: int) -> str:
    return f"{part / whole:.3f}" if whole else "–"


def _clients(quality: Mapping[str, Any]) -> Parts | None:
    """Make the table of the spread over clients: the metric on each client's held-out rows."""
    spread = quality.get("by_client")
    if not spread:
        return None
    figures = (spread[name] for name in ("mean", "worst_decile", "worst", "best"))
    return {
        "heads": ["clients", "median rows", "mean", "worst tenth", "worst", "best"],
        "rows": [
            (
                f"{spread['clients']:,}",
                f"{spread['median_rows']:g}",
                *(f"{figure:.4f}" for figure in figures),
            )
        ],
    }


def _rounds(report: Report) -> Parts | None:
    if report.rounds is None:
        return None
    metric = report.result["quality"]["metric"]
    return {
        "progress_plot": Markup(progress_svg(report.rounds, metric, prefix="progress")),
        "bytes_plot": Markup(bytes_svg(report.rounds, prefix="bytes")),
        "heads": ["round", "clients", "replies", "loss", metric, "up B", "down B", "plan B", "s"],
        "rows": [_round_row(record) for record in report.rounds],
    }


def _round_row(record: Mapping[str, Any]) -> tuple[str, ...]:
    value, loss = record["metric"], record.get("loss")
    return (
        f"{record.get('kind', '')} {record['round']}".strip(),
        f"{record.get('clients', 0):,}",
        f"{record.get('replies', 0):,}",
        "" if loss is None else f"{loss:.4f}",
        "" if value is None else f"{value:.4f}",
        *(f"{record[kind]:,}" for kind in KINDS),
        f"{record.get('round_seconds', 0.0):.1f}",
    )


def _stages(time: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    total = time["total_seconds"]
    named = {
        "search": time.get("search_seconds"),
        "rounds": time["rounds_seconds"],
        "evaluation": time["evaluation_seconds"],
    }
    known = {name: seconds for name, seconds in named.items() if seconds}
    known["preparation and the rest"] = max(0.0, total - sum(known.values()))
    for name, seconds in (*known.items(), ("the run", total)):
        yield name, show_seconds(seconds), show_percent(seconds / total) if total else ""


def _values_by_kind(kinds: Mapping[str, int]) -> list[str]:
    whole = f"values: {sum(kinds.values()):,}"
    return [whole, *(f"{kind} {size:,}" for kind, size in kinds.items())]


def _density_map(grid: Grid) -> Heat:
    top = max((c.chosen / c.entries for c in grid.cells.values() if c.entries), default=0.0)

    def show(cell: Cell) -> tuple[str, float, str]:
        density = cell.chosen / cell.entries
        words = f"{cell.chosen:,} of {cell.entries:,} entries"
        return show_percent(density), math.sqrt(density / top) if top else 0.0, words

    rows = []
    for layer in grid.layers:
        row = [grid.cells[layer, role] for role in grid.roles if (layer, role) in grid.cells]
        density = sum(c.chosen for c in row) / sum(c.entries for c in row)
        whole = HeatCell(show_percent(density), "0%", f"{layer}, all", "all")
        rows.append((layer, [*_heat_cells(grid, layer, show), whole]))
    return Heat(["layer", *grid.roles, "all"], rows)


def _structure_map(grid: Grid) -> Heat | None:
    def show(cell: Cell) -> tuple[str, float, str]:
        kinds = " ".join(dict.fromkeys(cell.modules))
        gate = max(cell.gates, default=None)
        text = kinds if gate is None else f"{kinds} {gate:.2f}"
        return text, 0.5 if gate is None else gate, ", ".join(cell.modules)

    if not grid.cells:
        return None
    rows = [(layer, _heat_cells(grid, layer, show)) for layer in grid.layers]
    return Heat(["layer", *grid.roles], rows)


def _heat_cells(
    grid: Grid, layer: str, show: Callable[[Cell], tuple[str, float, str]]
) -> list[HeatCell | None]:
    """Return a layer's cells; `show` gives a cell's text, strength in [0, 1], and full words."""
    cells: list[HeatCell | None] = []
    for role in grid.roles:
        cell = grid.cells.get((layer, role))
        if cell is None:
            cells.append(None)
            continue
        text, strength, words = show(cell)
        cells.append(HeatCell(text, _share(strength), f"{layer}, {role}: {words}"))
    return cells


def _share(strength: float) -> str:
    return f"{100 * FULLEST * min(max(strength, 0.0), 1.0):.1f}%"


def gate_heat(structure: Any) -> Heat | None:
    """Return the gates of a searched structure as a heat map; None where there are none."""
    found = gate_map(structure)
    if found is None:
        return None
    rows = []
    for row in found.rows:
        cells: list[HeatCell | None] = []
        for layer in found.layers:
            gate = found.cells.get((row, layer))
            if gate is None:
                cells.append(None)
                continue
            chosen = ", chosen" if gate.chosen else ""
            words = f"{show_percent(gate.probability)}, {gate.size:,} values{chosen}"
            cells.append(
                HeatCell(
                    f"{100 * gate.probability:.0f}{MARK if gate.chosen else ''}",
                    _share(gate.probability),
                    f"{gate.target}: {words}",
                    "chosen" if gate.chosen else "",
                )
            )
        rows.append((row, cells))
    return Heat(["layer", *found.layers], rows)


def _gates(report: Report) -> Parts | None:
    found = None if report.structure is None else gate_heat(report.structure)
    if found is None or report.structure is None:
        return None
    return {"facts": list(structure_facts(report.structure)), "map": found}


def _refused(refused: Sequence[Mapping[str, Any]]) -> Parts | None:
    if not refused:
        return None
    return {
        "counts": [
            (
                f"{count.times:,}",
                count.node or "-",
                count.reason,
                _some(count.clients),
                _some(count.rounds),
            )
            for count in count_refusals(refused)
        ],
        "each": [(entry["round"], entry["who"], entry["reason"]) for entry in refused],
    }


def _some(names: Sequence[object]) -> str:
    """List the first few, and the number of the others."""
    shown = ", ".join(str(name) for name in names[:SOME])
    return shown if len(names) <= SOME else f"{shown} and {len(names) - SOME:,} more"


def _settings(config: Mapping[str, Any]) -> Parts | None:
    """Split the settings into those that decided the run and those that were not in force."""
    if not config:
        return None
    defaults = Experiment().to_tables()
    in_force: list[tuple[str, list[tuple[str, str, bool]]]] = []
    idle: list[tuple[str, list[tuple[str, str, bool]]]] = []
    for stage, keys in config.items():
        rows: dict[bool, list[tuple[str, str, bool]]] = {True: [], False: []}
        for key, value in keys.items():
            shown = ", ".join(map(str, value)) if isinstance(value, list) else show_value(value)
            changed = value != defaults.get(stage, {}).get(key)
            rows[_is_in_force(config, stage, key)].append((key, shown, changed))
        for part, found in ((in_force, rows[True]), (idle, rows[False])):
            if found:
                part.append((stage, found))
    return {"in_force": in_force, "idle": idle}


def _is_in_force(config: Mapping[str, Any], stage: str, key: str) -> bool:
    """Return False for a setting that another one turns off."""
    own = config[stage]
    if stage == "search":
        return bool(own.get("federated"))
    if stage == "mask" and not own.get("enabled", True):
        return key == "enabled"
    if stage == "clients":
        needs = {"eval-values": "eval-fraction", "unseen-every": "unseen-fraction"}
        if key in needs or (key == "seed" and own.get("unseen-fraction")):
            return bool(own.get(needs.get(key, "unseen-fraction")))
        wanted = {
            "client-column": ("column", "nodes"),
            "num-clients": ("dirichlet", "shards", "iid", "nodes"),
            "dirichlet-alpha": ("dirichlet",),
            "shards-per-client": ("shards",),
            "seed": ("dirichlet", "shards", "iid"),
        }
        return key not in wanted or own.get("partition") in wanted[key]
    if stage == "structure" and key == "preset":
        return not own.get("file")
    if stage == "data" and key == "eval-fraction":
        return not own.get("eval-split")
    if stage == "strategy":
        field = key.replace("-", "_")
        rules = [name for name, rule in registered_rules().items() if field in rule.parameters()]
        return not rules or own.get("name") in rules
    return True


def _provenance(report: Report) -> Iterator[tuple[str, str]]:
    result = report.result
    run, machine = result["run"], result["run"]["machine"]
    if report.date:
        yield "date", report.date
    yield "checkpoint", report.checkpoint
    yield "its fingerprint", run["fingerprint"]
    yield "plan", run["plan_digest"] or "–"
    yield "final values", result["final_values_sha256"]
    yield "machine", ", ".join(f"{name} {value}" for name, value in machine.items() if value)
