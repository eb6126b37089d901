"""Write the commented text of an experiment for given columns."""

from __future__ import annotations

import json

from fedpet.cli.column_guess import Columns

__all__ = ["experiment_text"]

MIN_ROWS, MIN_CLIENTS = 8, 2
CLIENTS_PER_ROUND, MADE_CLIENTS, ROWS_OF_A_MADE_CLIENT = 10, 40, 16


def experiment_text(source: str, columns: Columns, evaluation: str, num_rows: int) -> str:
    """Return a TOML text.

    Args:
        source: The data, as `data.source` names it.
        columns: Its columns.
        evaluation: The evaluation split, "" where rows are held out of the training split.
        num_rows: Rows of the training split.
    """
    clients, taking_part = _clients(columns, num_rows if evaluation else int(0.8 * num_rows))
    return "\n".join(
        [
            "# Made by `fedpet init` from the names and values of the columns: check what it says.",
            "# Every key and its default: docs/settings.md. A run: fedpet simulate THIS_FILE",
            "",
            "[backbone]",
            'model = "bundled" # a small English model; or a hub name, a folder, "package:NAME"',
            "",
            "[data]",
            f"source = {_text(source)}",
            f"text-columns = {_text(list(columns.texts))} # two for pairs of texts",
            f"label-column = {_text(columns.label)} # {_label(columns)}",
            *_task(columns),
            *_evaluation(evaluation),
            f"max-length = {_max_length(columns.words)} # tokens a row; longer ones are cut",
            "",
            "[clients]",
            *clients,
            "",
            "[mask]",
            "density = 0.001 # fraction of the weights that is trained",
            "",
            "[structure]",
            'preset = "lora-factors+lnfit" # small modules beside the mask',
            "",
            "[training]",
            'learning-rate = "auto" # a rate for each kind of module, derived from the model',
            *(
                []
                if columns.is_regression
                else ["logit-adjustment = 1.0 # for clients whose labels are skewed; 0 is off"]
            ),
            "",
            "[strategy]",
            "num-rounds = 20",
            f"clients-per-round = {min(CLIENTS_PER_ROUND, taking_part)} # of {taking_part}",
            "evaluate-every = 5",
            "",
        ]
    )


def _clients(columns: Columns, num_rows: int) -> tuple[list[str], int]:
    """Lines of [clients], and the number of clients that take part."""
    if columns.client:
        sizes = sorted(columns.rows_by_client.values(), reverse=True)
        wanted = min(MIN_CLIENTS, len(sizes))
        min_rows = max(1, min(MIN_ROWS, sizes[wanted - 1] // 2))
        taking_part = sum(size >= min_rows for size in sizes)
        return [
            'partition = "column"',
            f"client-column = {_text(columns.client)} # {len(sizes):,} clients",
            f"min-rows = {min_rows} # smaller clients take no part: "
            f"{len(sizes) - taking_part:,} here",
        ], taking_part
    number = max(MIN_CLIENTS, min(MADE_CLIENTS, num_rows // ROWS_OF_A_MADE_CLIENT))
    if columns.is_regression:
        return [
            'partition = "iid" # no client column was found: rows are dealt out evenly',
            f"num-clients = {number}",
            "min-rows = 1",
        ], number
    return [
        'partition = "dirichlet" # no client column was found: clients are made, skewed in labels',
        f"num-clients = {number}",
        "dirichlet-alpha = 1.0 # the smaller, the more skewed",
        "min-rows = 1",
    ], number


def _label(columns: Columns) -> str:
    if columns.is_regression:
        return "a number"
    classes, total = columns.rows_by_class, sum(columns.rows_by_class.values())
    return (
        f"{len(classes)} classes; the largest has {max(classes.values()) / total:.0%} of the rows"
    )


def _task(columns: Columns) -> list[str]:
    if columns.is_regression:
        return ['task = "regression"', 'metric = "pearson"']
    return ['metric = "accuracy" # or f1, matthews']


def _evaluation(split: str) -> list[str]:
    if split:
        return [f"eval-split = {_text(split)}"]
    return ['eval-split = "" # there is none: rows are held out', "eval-fraction = 0.2"]


def _max_length(words: int) -> int:
    """Tokens for all but the longest rows: about 1.4 a word, and the special ones."""
    return next((length for length in (32, 64, 128) if length >= 1.4 * words + 3), 256)


def _text(value: str | list[str]) -> str:
    return json.dumps(value, ensure_ascii=False)
