"""The sections of a page, in their order: each takes a report and yields HTML.

In:  a `Report` (fedpet/report/loading.py).
Out: the key figures; the metric against bytes; bytes by round and kind; where it trains; the gates
     of a search; what was refused; the configuration; the versions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import fedpet
from fedpet.config import Experiment
from fedpet.report.comparison import Row, columns_of, notes
from fedpet.report.curves import KINDS
from fedpet.report.gate_tables import gate_html, structure_facts
from fedpet.report.heatmaps import density_map, structure_map
from fedpet.report.html import FULLEST, section, swatch, swatch_of, table
from fedpet.report.loading import Report
from fedpet.report.number_format import (
    show_baseline,
    show_percent,
    show_predicted,
    show_ratio,
    show_value,
)
from fedpet.report.plots import bytes_svg, metric_svg
from fedpet.report.refusals import count_refusals
from fedpet.utils.formatting import format_bytes, show_seconds

__all__ = ["SECTIONS"]

SOME = 8  # names that a cell shows


def _header(report: Report) -> Iterator[str]:
    run, data = report.result["run"], report.result["data"]
    troubles = [] if run["status"] == "ok" else [run["status"]]
    troubles += report.result["quality"].get("warnings", ())
    warned = "".join(f'<p class="warn">{escape(trouble)}</p>' for trouble in troubles)
    yield (
        f"<header><h1>{escape(run['experiment'])}</h1>"
        f'<p class="muted">{escape(run["method"])} on {escape(run["backbone"])}, '
        f"{data['clients']:,} clients with {data['train_rows']:,} rows, "
        f"{data['evaluation_rows']:,} rows to evaluate on, seed {run['seed']}</p>{warned}</header>"
    )


def _key_figures(report: Report) -> Iterator[str]:
    result = report.result
    quality, model, sent = result["quality"], result["model"], result["communication"]
    before = quality["before"]
    share = model["communicated_values"] / (model["backbone_parameters"] + model["head_values"])
    rounds = max((point["round"] for point in quality["by_round"]), default=0)
    compared = [f"before training {before:.4f}"] if before is not None else []
    if "majority_baseline" in quality:  # the result of an older fedpet has none
        compared.append(f"majority baseline {show_baseline(quality)}")
    figures = [
        (
            quality["metric"],
            f"{quality['final']:.4f}",
            ", ".join(compared),
        ),
        (
            "of dense FedAvg's bytes",
            show_ratio(sent["ratio_to_dense"]),
            f"{format_bytes(sent['dense_fedavg_total_bytes'])} by formula",
        ),
        (
            "sent in total",
            format_bytes(sent["total_bytes"]),
            f"in {rounds} rounds, plan included{_of_search(sent)}",
        ),
        (
            "values communicated",
            f"{model['communicated_values']:,}",
            f"{show_percent(share)} of the parameters",
        ),
        ("up, a client and round", format_bytes(sent["uplink_bytes_per_client_round"]), ""),
        ("down, a client and round", format_bytes(sent["downlink_bytes_per_client_round"]), ""),
        ("plan, a client, once", format_bytes(sent["plan_bytes_per_client"]), ""),
        (
            "time",
            show_seconds(result["time"]["total_seconds"]),
            f"rounds {show_seconds(result['time']['rounds_seconds'])}",
        ),
    ]
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}"
        f"{f'<small>{escape(more)}</small>' if more else ''}</dd></div>"
        for name, value, more in figures
    )
    yield f'<section><dl class="key">{cells}</dl></section>'


def _of_search(sent: Mapping[str, Any]) -> str:
    search = sent.get("by_kind", {}).get("search")
    if search is None:
        return ""
    return f"; {format_bytes(search['total_bytes'])} of it in {search['rounds']} rounds of a search"


def _quality(report: Report) -> Iterator[str]:
    metric = report.result["quality"]["metric"]
    plots = {
        direction: metric_svg(report.lines, metric, direction, prefix=direction)
        for direction in ("both", "up", "down")
    }
    spread = [line.name for line in report.lines if not line.curve.exact]
    groups = sorted({(line.number, line.group) for line in report.lines})
    legend = "".join(f"<li>{swatch_of(number)}{escape(name)}</li>" for number, name in groups)
    parts = [
        f'<ul class="legend">{legend}</ul>' if len(groups) > 1 else "",
        f"<figure>{plots['both']}</figure>",
        f'<div class="pair"><figure>{plots["up"]}</figure><figure>{plots["down"]}</figure></div>',
    ]
    if predicted := report.result["quality"].get("predicted"):
        shown = escape(show_predicted(predicted))
        parts.append(f'<p class="small muted">Predicted at the end: {shown}.</p>')
    if spread:
        parts.append(
            '<p class="small muted">Dashed: the file holds no bytes by round, the total is spread '
            "evenly over the rounds.</p>"
        )
    for question in dict.fromkeys(row.group.question for row in report.rows):
        rows = [row for row in report.rows if row.group.question == question]
        parts.append(_comparison(report, rows))
    yield section(f"{metric} against bytes sent", *parts)


def _comparison(report: Report, rows: Sequence[Row]) -> str:
    """A table that is the plots' legend as well."""
    columns = columns_of(rows)
    body = []
    for row in rows:
        number = report.numbers[row.group.title, row.group.name]
        cells = "".join(f"<td>{escape(show(row))}</td>" for _, show in columns)
        main = ' class="main"' if number == 0 else ""
        body.append(
            f'<tr{main}><th scope="row">{swatch_of(number)}'
            f"{escape(row.group.name)}</th>{cells}</tr>"
        )
    told = "".join(f'<p class="small muted">{escape(note)}</p>' for note in notes(rows))
    return (
        "<h3>"
        + escape(rows[0].group.title)
        + "</h3>"
        + table(["", *(name for name, _ in columns)], body)
        + told
    )


def _bytes(report: Report) -> Iterator[str]:
    sent = report.result["communication"]
    legend = "".join(
        f"<li>{swatch(name)}{name} {format_bytes(sent[kind])}</li>"
        for kind, name in zip(KINDS, ("up", "down", "plan"), strict=True)
    )
    parts = [f'<ul class="legend">{legend}</ul>']
    if report.rounds is None:
        parts.append(
            '<p class="muted">The run folder has no rounds.jsonl: by round is not known.</p>'
        )
    else:
        parts.append(f"<figure>{bytes_svg(report.rounds, prefix='bytes')}</figure>")
        parts.append(_rounds_table(report))
    yield section("Bytes by round and kind", *parts)


def _rounds_table(report: Report) -> str:
    metric = report.result["quality"]["metric"]
    body = []
    for record in report.rounds or ():
        value, loss = record["metric"], record.get("loss")
        cells = [
            f"{record.get('clients', 0):,}",
            f"{record.get('replies', 0):,}",
            "" if loss is None else f"{loss:.4f}",
            "" if value is None else f"{value:.4f}",
            *(f"{record[kind]:,}" for kind in KINDS),
            f"{record.get('round_seconds', 0.0):.1f}",
        ]
        body.append(
            f'<tr><th scope="row">{_round_name(record)}</th>'
            + "".join(f"<td>{cell}</td>" for cell in cells)
            + "</tr>"
        )
    heads = ["round", "clients", "replies", "loss", metric, "up B", "down B", "plan B", "seconds"]
    return f"<details><summary>All rounds</summary>{table(heads, body)}</details>"


def _round_name(record: Mapping[str, Any]) -> str:
    kind = record.get("kind", "")
    return escape(f"{kind} {record['round']}".strip())


def _places(report: Report) -> Iterator[str]:
    places = report.places
    kinds = report.result["model"]["values_by_kind"]
    legend = "".join(f"<li>{escape(kind)} {size:,}</li>" for kind, size in kinds.items())
    parts = [
        f'<ul class="legend"><li>values: {sum(kinds.values()):,}</li>{legend}</ul>',
    ]
    if places.mask is not None:
        parts.append("<h3>Density of the mask</h3>")
        parts.append(density_map(places.mask))
    elif places.left_out:
        parts.append(
            f'<p class="muted">The mask by layer is not shown: {escape(places.left_out)}</p>'
        )
    if places.structure.cells:
        parts.append("<h3>Modules of the structure</h3>")
        parts.append(structure_map(places.structure))
    yield section("Where it trains", *parts)


def _search(report: Report) -> Iterator[str]:
    """How likely every candidate was, where the run's structure was searched."""
    if report.structure is None:
        return
    heat = gate_html(report.structure, FULLEST)
    if heat:
        facts = "".join(
            f"<li>{escape(name)}: {escape(value)}</li>"
            for name, value in structure_facts(report.structure)
        )
        yield section(
            "Gates of the search",
            f'<ul class="legend">{facts}</ul>',
            '<p class="small muted">How likely each candidate was when the search chose, in '
            "percent, by layer. Framed: chosen.</p>",
            heat,
        )


def _refused(report: Report) -> Iterator[str]:
    refused = report.result["refused"]
    if not refused:
        yield section("Refused replies", '<p class="muted">None.</p>')
        return
    counts = [
        f'<tr><th scope="row">{count.times:,}</th><td>{escape(count.node or "-")}</td>'
        f"<td>{escape(count.reason)}</td><td>{escape(_some(count.clients))}</td>"
        f"<td>{escape(_some(count.rounds))}</td></tr>"
        for count in count_refusals(refused)
    ]
    body = [
        f'<tr><th scope="row">{entry["round"]}</th><td>{escape(str(entry["who"]))}</td>'
        f"<td>{escape(str(entry['reason']))}</td></tr>"
        for entry in refused
    ]
    each = table(["round", "who", "reason"], body, "words")
    yield section(
        f"Refused replies ({len(refused):,})",
        table(["times", "node", "reason", "clients", "rounds"], counts, "words")
        + f"<details><summary>One by one</summary>{each}</details>",
    )


def _some(names: Sequence[object]) -> str:
    """The first few, and how many more there are."""
    shown = ", ".join(str(name) for name in names[:SOME])
    return shown if len(names) <= SOME else f"{shown} and {len(names) - SOME:,} more"


def _configuration(report: Report) -> Iterator[str]:
    if not report.config:
        return
    defaults = Experiment().to_tables()
    tables = []
    for stage, keys in report.config.items():
        rows = []
        for key, value in keys.items():
            changed = value != defaults.get(stage, {}).get(key)
            shown = ", ".join(map(str, value)) if isinstance(value, list) else show_value(value)
            rows.append(
                f'<tr><th scope="row">{escape(key)}</th>'
                f"<td{' class=changed' if changed else ''}><code>{escape(shown) or '–'}</code></td>"
                "</tr>"
            )
        tables.append(
            f'<table class="words"><caption>{escape(stage)}</caption>'
            f"<tbody>{''.join(rows)}</tbody></table>"
        )
    yield section(
        "Configuration",
        '<p class="small muted">Bold: differs from the default.</p>',
        f'<div class="tables">{"".join(tables)}</div>',
    )


def _provenance(report: Report) -> Iterator[str]:
    result = report.result
    run, machine = result["run"], result["run"]["machine"]
    facts = {
        "checkpoint": run["fingerprint"],
        "plan": run["plan_digest"] or "–",
        "final values": result["final_values_sha256"],
        "machine": ", ".join(f"{name} {value}" for name, value in machine.items() if value),
    }
    rows = [
        f'<tr><th scope="row">{escape(name)}</th><td><code>{escape(str(value))}</code></td></tr>'
        for name, value in facts.items()
    ]
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    yield section(
        "Versions and machine",
        f'<table class="words"><tbody>{"".join(rows)}</tbody></table>',
        f"<p>{escape(versions)}</p>",
    )
    yield (
        f"<footer>Written by fedpet {escape(fedpet.__version__)}. Bytes are counted on the "
        "serialised messages, each client alone with its own; MB is 10<sup>6</sup> bytes. Dense "
        "FedAvg is a formula: 4 bytes a parameter, both ways, the same rounds and clients, no "
        "framing.</footer>"
    )


SECTIONS = (
    _header,
    _key_figures,
    _quality,
    _bytes,
    _places,
    _search,
    _refused,
    _configuration,
    _provenance,
)
