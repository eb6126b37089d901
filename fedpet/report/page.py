"""One page about a run, and about those it is compared with: opens offline, light and dark.

    ... -> strategy -> ledger -> [report]

In:  a run folder, and runs, result files or cell files to compare it with.
Out: one HTML file that loads nothing: the metric against cumulative bytes, bytes by round and
     kind, where the mask and the structure lie, what was refused, the configuration, the versions.

The plots are drawn beforehand (`fedpet.report.plots`), so the page needs no script. A number that
a plot shows stands in a table as well.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import fedpet
from fedpet.config import Experiment
from fedpet.errors import FedpetError, InputError
from fedpet.report.books import KINDS, read_curve, read_rounds
from fedpet.report.compare import REFERENCE, Row, compare_rows, group_runs, notes, read_results
from fedpet.report.gates import gate_html, structure_facts
from fedpet.report.numbers import show_count, show_percent, show_ratio
from fedpet.report.places import Cell, Grid, Places, find_places
from fedpet.report.plots import SERIES, Line, bytes_svg, metric_png, metric_svg
from fedpet.report.refusals import count_refusals
from fedpet.structure import Structure
from fedpet.units import show_bytes, show_seconds

__all__ = ["Report", "page", "read_report", "write_page", "write_png"]

# How much of a cell's colour the fullest cell has: text on it must stay readable.
FULLEST = 0.6
SOME = 8  # names that a cell shows


@dataclass(frozen=True)
class Report:
    """Everything a page tells."""

    result: Mapping[str, Any]
    rounds: Sequence[Mapping[str, Any]] | None
    config: Mapping[str, Any]  # tables of config.toml; empty where there is none
    lines: Sequence[Line]
    rows: Sequence[Row]
    numbers: Mapping[tuple[str, str], int]  # of a group, by title and name: colour and marker
    places: Places
    structure: Structure | None  # of structure.json


def read_report(run: Path, compared: Sequence[Path] = ()) -> Report:
    """Read a run folder and what it is compared with.

    Raises:
        InputError: `run` is no finished run's folder, a compared path holds no result, or the
            runs are measured by different metrics.
    """
    if not (run / "result.json").is_file():
        raise InputError(
            f"{str(run)!r} is not the folder of a finished run: it has no result.json. Give the "
            "folder that `fedpet simulate` named at its end."
        )
    results = read_results([run, *compared])
    result = results[0]
    metric = result["quality"]["metric"]
    for other in results:
        if other["quality"]["metric"] != metric:
            raise InputError(
                f"a page shows one metric: {str(run)!r} was measured by {metric}, "
                f"{other['path']!r} by {other['quality']['metric']}."
            )
    groups = group_runs(results)
    several = len({group.title for group in groups}) > 1
    names = [f"{g.title}: {g.name}" if several else g.name for g in groups]
    mine = next(i for i, group in enumerate(groups) if any(r is result for r in group.runs))
    order = [mine, *(index for index in range(len(groups)) if index != mine)]
    numbers = {(groups[i].title, groups[i].name): number for number, i in enumerate(order)}
    lines = [
        Line(
            name=f"{name}, seed {one['run']['seed']}",
            group=name,
            number=numbers[group.title, group.name],
            curve=read_curve(one),
            main=one is result,
        )
        for group, name in zip(groups, names, strict=True)
        for one in group.runs
    ]
    return Report(
        result=result,
        rounds=read_rounds(result),
        config=_read_config(run / "config.toml"),
        lines=lines,
        rows=compare_rows(results),
        numbers=numbers,
        places=_places(run),
        structure=_structure(run),
    )


def write_page(report: Report, path: Path) -> None:
    """Write the page to a file.

    Raises:
        InputError: The file cannot be written.
    """
    _write(path, lambda: path.write_text(page(report), encoding="utf-8"))


def write_png(report: Report, path: Path) -> None:
    """Write the main plot to a file.

    Raises:
        InputError: The file cannot be written.
    """
    metric = report.result["quality"]["metric"]
    _write(path, lambda: metric_png(report.lines, metric, path))


def page(report: Report) -> str:
    """The page as HTML. The same report gives the same text."""
    run = report.result["run"]
    title = f"{run['experiment']}: {run['method']}, seed {run['seed']}"
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    body = "\n".join(
        part
        for section in (
            _header,
            _key_figures,
            _quality,
            _bytes,
            _places_section,
            _search_section,
            _refused,
            _configuration,
            _provenance,
        )
        for part in section(report)
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


# The parts, in the order of the page


def _header(report: Report) -> Iterator[str]:
    run, data = report.result["run"], report.result["data"]
    status = "" if run["status"] == "ok" else f'<p class="warn">{escape(run["status"])}</p>'
    yield (
        f"<header><h1>{escape(run['experiment'])}</h1>"
        f'<p class="muted">{escape(run["method"])} on {escape(run["backbone"])}, '
        f"{data['clients']:,} clients with {data['train_rows']:,} rows, "
        f"{data['evaluation_rows']:,} rows to evaluate on, seed {run['seed']}</p>{status}</header>"
    )


def _key_figures(report: Report) -> Iterator[str]:
    result = report.result
    quality, model, sent = result["quality"], result["model"], result["communication"]
    before = quality["before"]
    share = model["communicated_values"] / (model["backbone_parameters"] + model["head_values"])
    rounds = max((point["round"] for point in quality["by_round"]), default=0)
    figures = [
        (
            quality["metric"],
            f"{quality['final']:.4f}",
            f"before training {before:.4f}" if before is not None else "",
        ),
        (
            "of dense FedAvg's bytes",
            show_ratio(sent["ratio_to_dense"]),
            f"{show_bytes(sent['dense_fedavg_total_bytes'])} by formula",
        ),
        (
            "sent in total",
            show_bytes(sent["total_bytes"]),
            f"in {rounds} rounds, plan included{_of_search(sent)}",
        ),
        (
            "values communicated",
            f"{model['communicated_values']:,}",
            f"{show_percent(share)} of the parameters",
        ),
        ("up, a client and round", show_bytes(sent["uplink_bytes_per_client_round"]), ""),
        ("down, a client and round", show_bytes(sent["downlink_bytes_per_client_round"]), ""),
        ("plan, a client, once", show_bytes(sent["plan_bytes_per_client"]), ""),
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
    return f"; {show_bytes(search['total_bytes'])} of it in {search['rounds']} rounds of a search"


def _quality(report: Report) -> Iterator[str]:
    metric = report.result["quality"]["metric"]
    plots = {
        direction: metric_svg(report.lines, metric, direction, prefix=direction)
        for direction in ("both", "up", "down")
    }
    spread = [line.name for line in report.lines if not line.curve.exact]
    groups = sorted({(line.number, line.group) for line in report.lines})
    legend = "".join(f"<li>{_swatch_of(number)}{escape(name)}</li>" for number, name in groups)
    parts = [
        f'<ul class="legend">{legend}</ul>' if len(groups) > 1 else "",
        f"<figure>{plots['both']}</figure>",
        f'<div class="pair"><figure>{plots["up"]}</figure><figure>{plots["down"]}</figure></div>',
    ]
    if spread:
        parts.append(
            '<p class="small muted">Dashed: the file holds no bytes by round, the total is spread '
            "evenly over the rounds.</p>"
        )
    for question in dict.fromkeys(row.group.question for row in report.rows):
        rows = [row for row in report.rows if row.group.question == question]
        parts.append(_comparison(report, rows))
    yield _section(f"{metric} against bytes sent", *parts)


def _comparison(report: Report, rows: Sequence[Row]) -> str:
    """A table that is the plots' legend as well."""
    with_full = any(row.fraction_of_full is not None for row in rows)
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("seeds", lambda row: str(row.seeds)),
        (rows[0].group.metric, _show_mean),
        ("of full", lambda row: _or_dash(show_percent, row.fraction_of_full)),
        ("values", lambda row: show_count(row.communicated_values)),
        ("up, client\nand round", lambda row: show_bytes(row.uplink_bytes_per_client_round)),
        ("down, client\nand round", lambda row: show_bytes(row.downlink_bytes_per_client_round)),
        ("sent in\ntotal", lambda row: show_bytes(row.total_bytes)),
        ("of full's\nbytes", lambda row: _or_dash(show_ratio, row.ratio_to_full)),
        ("of dense\nFedAvg", lambda row: show_ratio(row.ratio_to_dense)),
    ]
    if not with_full:
        columns = [column for column in columns if REFERENCE not in column[0]]
    body = []
    for row in rows:
        number = report.numbers[row.group.title, row.group.name]
        cells = "".join(f"<td>{escape(show(row))}</td>" for _, show in columns)
        main = ' class="main"' if number == 0 else ""
        body.append(
            f'<tr{main}><th scope="row">{_swatch_of(number)}'
            f"{escape(row.group.name)}</th>{cells}</tr>"
        )
    told = "".join(f'<p class="small muted">{escape(note)}</p>' for note in notes(rows))
    return (
        "<h3>"
        + escape(rows[0].group.title)
        + "</h3>"
        + _table(["", *(name for name, _ in columns)], body)
        + told
    )


def _bytes(report: Report) -> Iterator[str]:
    sent = report.result["communication"]
    legend = "".join(
        f"<li>{_swatch(name)}{name} {show_bytes(sent[kind])}</li>"
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
    yield _section("Bytes by round and kind", *parts)


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
    return f"<details><summary>All rounds</summary>{_table(heads, body)}</details>"


def _round_name(record: Mapping[str, Any]) -> str:
    kind = record.get("kind", "")
    return escape(f"{kind} {record['round']}".strip())


def _places_section(report: Report) -> Iterator[str]:
    places = report.places
    kinds = report.result["model"]["values_by_kind"]
    legend = "".join(f"<li>{escape(kind)} {size:,}</li>" for kind, size in kinds.items())
    parts = [
        f'<ul class="legend"><li>values: {sum(kinds.values()):,}</li>{legend}</ul>',
    ]
    if places.mask is not None:
        parts.append("<h3>Density of the mask</h3>")
        parts.append(_density_map(places.mask))
    elif places.left_out:
        parts.append(
            f'<p class="muted">The mask by layer is not shown: {escape(places.left_out)}</p>'
        )
    if places.structure.cells:
        parts.append("<h3>Modules of the structure</h3>")
        parts.append(_structure_map(places.structure))
    yield _section("Where it trains", *parts)


def _search_section(report: Report) -> Iterator[str]:
    """How likely every candidate was, where the run's structure was searched."""
    if report.structure is None:
        return
    heat = gate_html(report.structure, FULLEST)
    if heat:
        facts = "".join(
            f"<li>{escape(name)}: {escape(value)}</li>"
            for name, value in structure_facts(report.structure)
        )
        yield _section(
            "Gates of the search",
            f'<ul class="legend">{facts}</ul>',
            '<p class="small muted">How likely each candidate was when the search chose, in '
            "percent, by layer. Framed: chosen.</p>",
            heat,
        )


def _density_map(grid: Grid) -> str:
    top = max((c.chosen / c.entries for c in grid.cells.values() if c.entries), default=0.0)

    def show(cell: Cell) -> tuple[str, float, str]:
        density = cell.chosen / cell.entries
        words = f"{cell.chosen:,} of {cell.entries:,} entries"
        return show_percent(density), math.sqrt(density / top) if top else 0.0, words

    body = []
    for layer in grid.layers:
        row = [grid.cells[layer, role] for role in grid.roles if (layer, role) in grid.cells]
        everything = Cell(sum(c.entries for c in row), sum(c.chosen for c in row))
        share = show_percent(everything.chosen / everything.entries)
        body.append(_heat_row(grid, layer, show, f'<td class="all">{share}</td>'))
    return _table(["layer", *grid.roles, "all"], body, "heat")


def _structure_map(grid: Grid) -> str:
    def show(cell: Cell) -> tuple[str, float, str]:
        kinds = " ".join(dict.fromkeys(cell.modules))
        if not cell.gates:
            return kinds, 0.5, ", ".join(cell.modules)
        gate = max(cell.gates)
        return f"{kinds} {gate:.2f}", gate, ", ".join(cell.modules)

    body = [_heat_row(grid, layer, show) for layer in grid.layers]
    return _table(["layer", *grid.roles], body, "heat")


def _heat_row(
    grid: Grid, layer: str, show: Callable[[Cell], tuple[str, float, str]], end: str = ""
) -> str:
    """A row of cells; `show` gives a cell's text, its strength in [0, 1], and its full words."""
    cells = []
    for role in grid.roles:
        cell = grid.cells.get((layer, role))
        if cell is None:
            cells.append('<td class="none"></td>')
            continue
        text, strength, words = show(cell)
        share = f"{100 * FULLEST * min(max(strength, 0.0), 1.0):.1f}%"
        cells.append(
            f'<td style="--share: {share}" title="{escape(f"{layer}, {role}: {words}")}">'
            f"{escape(text)}</td>"
        )
    return f'<tr><th scope="row">{escape(layer)}</th>{"".join(cells)}{end}</tr>'


def _refused(report: Report) -> Iterator[str]:
    refused = report.result["refused"]
    if not refused:
        yield _section("Refused replies", '<p class="muted">None.</p>')
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
    each = _table(["round", "who", "reason"], body, "words")
    yield _section(
        f"Refused replies ({len(refused):,})",
        _table(["times", "node", "reason", "clients", "rounds"], counts, "words")
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
    for stage, table in report.config.items():
        rows = []
        for key, value in table.items():
            changed = value != defaults.get(stage, {}).get(key)
            shown = ", ".join(map(str, value)) if isinstance(value, list) else _plain(value)
            rows.append(
                f'<tr><th scope="row">{escape(key)}</th>'
                f"<td{' class=changed' if changed else ''}><code>{escape(shown) or '–'}</code></td>"
                "</tr>"
            )
        tables.append(
            f'<table class="words"><caption>{escape(stage)}</caption>'
            f"<tbody>{''.join(rows)}</tbody></table>"
        )
    yield _section(
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
    yield _section(
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


# Small things


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title[:1].upper() + title[1:])}</h2>{''.join(parts)}</section>"


def _table(heads: Iterable[str], body: Iterable[str], kind: str = "") -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    name = f' class="{kind}"' if kind else ""
    return (
        f'<div class="scroll" tabindex="0"><table{name}><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _swatch(variable: str, shape: str = "square") -> str:
    return f'<span class="swatch {shape}" style="--colour: var(--{variable})"></span>'


def _swatch_of(number: int) -> str:
    """Colour and marker of a group, as the plots have them."""
    shapes = ("round", "square", "diamond")
    return _swatch(f"series-{number % SERIES}", shapes[number // SERIES % len(shapes)])


def _show_mean(row: Row) -> str:
    deviation = "" if row.deviation is None else f" ± {row.deviation:.4f}"
    return f"{row.mean:.4f}{deviation}"


def _or_dash(show: Callable[[float], str], value: float | None) -> str:
    return "–" if value is None else show(value)


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} is not a readable TOML file: {error}.") from None


def _structure(run: Path) -> Structure | None:
    try:
        return Structure.from_json((run / "structure.json").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, FedpetError):
        return None  # a page without it is better than none


def _places(run: Path) -> Places:
    """Where the run trained; a page without it is better than none."""
    if not (run / "plan.bin").is_file():
        return Places(None, Grid(), "the run has no plan")
    try:
        return find_places(run)
    except FedpetError as error:
        return Places(None, Grid(), str(error))


def _write(path: Path, write: Callable[[], object]) -> None:
    try:
        write()
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be written: {error.strerror or error}.") from None
