"""Small run folders for the tests of reports, written by the code that writes real ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from fedpet.backbone.pretrained import Origin
from fedpet.config import Experiment
from fedpet.data import Rows
from fedpet.protocol.ledger import Ledger
from fedpet.run.result import summarise
from fedpet.training.metrics import Assessment

FULL_PARAMETERS = 22_713_216
HEAD_VALUES = 770
FULL = {"backbone": FULL_PARAMETERS, "head": HEAD_VALUES}


def assessment(
    value: float, majority: float = 0.5, predicted: dict[str, float] | None = None
) -> Assessment:
    """Of an invented model that tells two classes apart."""
    shares = predicted or {"bad": 0.45, "good": 0.55}
    return Assessment(value, majority, "good", shares, is_constant=max(shares.values()) == 1.0)


def make_result(
    path: Path | None = None,
    *,
    method: str = "fedpet",
    experiment: str = "film-reviews",
    seed: int = 0,
    rounds: int = 4,
    clients: int = 5,
    message_bytes: int = 40_000,
    plan_bytes: int = 600,
    final: float = 0.8,
    majority: float = 0.5,
    predicted: dict[str, float] | None = None,
    values: dict[str, int] | None = None,
    refused: int = 0,
    settings: list[str] | None = None,
) -> dict[str, Any]:
    """Books of an invented run, added up as a real one's are; left in `path` where one is given.

    The metric rises from 0.5 to `final`; every client is new in the first round.
    """
    config = Experiment.from_tables({"training": {"learning-rate": 0.001}})
    config = replace(config, run=replace(config.run, name=experiment, seed=seed))
    if path is not None:
        path.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(path / "rounds.jsonl" if path is not None else None)
    for number in range(rounds + 1):
        record = ledger.begin(number)
        record.metric = 0.5 + (final - 0.5) * number / rounds
        record.evaluation_seconds = 0.5
        if number:
            record.clients, record.aggregated, record.loss = clients, True, 1 / number
            record.replies = clients - (refused if number == 1 else 0)
            record.newcomers = clients if number == 1 else 0
            record.train_seconds, record.round_seconds = 10.0, 11.0
            for client in range(clients):
                ledger.add_client_bytes(
                    down=message_bytes + 7,
                    up=message_bytes if client < record.replies else 0,
                    plan=plan_bytes if number == 1 else 0,
                )
            record.wire_bytes, record.messages = 2 * message_bytes, 4
            for client in range(refused if number == 1 else 0):
                ledger.refuse(f"client film-{client}", "its training gave NaN")
        ledger.close()
    result = summarise(
        config,
        method=method,
        ledger=ledger,
        data=SimpleNamespace(
            clients=[SimpleNamespace(rows=range(30)) for _ in range(40)],
            left_out_clients=3,
            left_out_rows=12,
            evaluation=Rows(np.zeros(872, np.int32), np.arange(873), np.zeros(872), None, 0),
            task=SimpleNamespace(metric="accuracy", label_names=()),
            books={},
        ),
        fingerprint="f" * 64,
        plan_digest="d" * 32,
        values_by_kind=values or {"mask": 53_084, "lnfit": 9_216, "head": HEAD_VALUES},
        pretrained_parameters=FULL_PARAMETERS,
        values_sha256=f"{seed:064x}",
        final=assessment(final, majority, predicted),
        total_seconds=192.0,
        origin=Origin(loaded=101, drawn=("classifier.weight", "classifier.bias")),
    )
    if path is not None:
        import tomli_w

        tables = Experiment.from_tables(config.to_tables()).to_tables()
        for setting in settings or []:
            key, _, value = setting.partition("=")
            stage, _, name = key.partition(".")
            tables[stage][name] = type(tables[stage][name])(value)
        (path / "config.toml").write_text(tomli_w.dumps(tables), encoding="utf-8")
        (path / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return result


def make_runs(tmp_path: Path) -> Path:
    """Run folders of fedpet and of two full fine-tunings, and a cell file beside them."""
    make_result(tmp_path / "fedpet", refused=2)
    for seed in range(2):
        make_result(
            tmp_path / f"full-{seed}",
            method="full",
            seed=seed,
            message_bytes=90_000_000,
            final=0.82,
            values=FULL,
        )
    cell = {"settings": {"mask": {"density": 0.02}}, "result": make_result(seed=1, final=0.77)}
    (tmp_path / "cell.json").write_text(json.dumps(cell), encoding="utf-8")
    return tmp_path


def to_text(renderable: Any, width: int = 80) -> str:
    """Return what a file or a pipe would get."""
    import io

    from rich.console import Console

    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    return console.file.getvalue()
