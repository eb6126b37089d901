"""Write the table of the chat job: what each method sends, and its share of full tuning's gain.

A share of the gain is (start - end) / (start - full fine-tuning's end) in perplexity, seed by seed.
Bytes are those of the ledgers.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from benchmarks.suite import Suite
from benchmarks.suite_tables import FULL, NOT_RUN, markdown
from fedpet.report.number_format import show_percent
from fedpet.utils.formatting import format_bytes

__all__ = ["chat_table"]

HEADS = (
    *("method", "values", "people", "of the gain", "replies", "of the gain"),
    *("up, a client", "down", "sent", "of dense", "rate"),
)
Ends = dict[int, tuple[float, float]]  # by seed: the metric at the start and at the end


def chat_table(suite: Suite) -> str:
    """Write the finished rows in Markdown."""
    (dataset,) = suite.datasets.values()
    found = {
        method.name: results
        for _, method in suite.work
        if (results := _learned(suite.results_of(dataset, method)))
    }
    full = found.get(FULL, {})
    rows = []
    for name, results in sorted(found.items(), key=lambda row: -_mean(row[1], "total_bytes")):
        choice = suite.choice(dataset, suite.methods[name])
        row = [name, f"{_first(results)['model']['communicated_values']:,}"]
        for split in (None, *dataset.also):
            ends, of_full = _ends(results, split), _ends(full, split)
            row += [_shown(ends), _share(ends, of_full)]
        row += [
            format_bytes(_mean(results, f"{way}link_bytes_per_client_round"))
            for way in ("up", "down")
        ]
        total, dense = (_mean(results, f"{one}total_bytes") for one in ("", "dense_fedavg_"))
        row += [format_bytes(total), f"1/{dense / total:,.0f}"]
        rows.append([*row, f"{choice.best:g}" + (" (edge)" if choice.at_edge else "")])
    return markdown(HEADS, rows) if rows else NOT_RUN


def _learned(results: Mapping[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    return {seed: result for seed, result in results.items() if "quality" in result}


def _first(results: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    return next(iter(results.values()))


def _mean(results: Mapping[int, dict[str, Any]], key: str) -> float:
    return statistics.mean(float(result["communication"][key]) for result in results.values())


def _ends(results: Mapping[int, dict[str, Any]], split: str | None) -> Ends:
    """Return start and end by seed, on the reported rows or on a further split."""
    if split is None:
        qualities = {seed: result["quality"] for seed, result in results.items()}
        return {seed: (one["before"], one["final"]) for seed, one in qualities.items()}
    further = {seed: result["also"][split] for seed, result in results.items()}
    return {seed: (one["initial"], one["final"]) for seed, one in further.items()}


def _shown(ends: Ends) -> str:
    values = [end for _, end in ends.values()]
    many = "" if len(values) > 2 else f" ({len(values)} seed{'s' * (len(values) > 1)})"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}{many}"


def _share(ends: Ends, full: Ends) -> str:
    seeds = sorted(set(ends) & set(full))
    shares = [(ends[s][0] - ends[s][1]) / (full[s][0] - full[s][1]) for s in seeds]
    return show_percent(statistics.mean(shares)) if shares else "–"
