"""Benchmarks run another checkout's fedpet in turn with this one's, by the same measurement."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

import benchmarks
from benchmarks import round_overhead
from benchmarks.noisy_rounds import CODECS
from benchmarks.side_by_side import BEFORE, HERE, NOW, SECONDS, in_turn, python_of, ratios, run_job

WHICH = "import fedpet, pathlib; print(pathlib.Path(fedpet.__file__).parent.parent)"


def test_two_checkouts_take_turns_and_one_alone_needs_none(tmp_path: Path) -> None:
    assert list(in_turn(tmp_path, 2)) == 2 * [(BEFORE, tmp_path), (NOW, HERE)]
    assert list(in_turn(None, 2)) == 2 * [(NOW, HERE)]


def test_a_process_imports_the_fedpet_of_its_checkout_and_of_no_other(tmp_path: Path) -> None:
    (tmp_path / "fedpet").mkdir()
    (tmp_path / "fedpet" / "__init__.py").touch()
    for checkout in (tmp_path, HERE):
        command, environment = python_of(checkout)
        done = subprocess.run(
            [*command, "-c", WHICH], env=environment, cwd=os.sep, capture_output=True, text=True
        )
        assert done.stdout.strip() == str(checkout), done.stderr


def test_medians_of_now_are_given_as_fractions_of_those_before() -> None:
    def row(code: str, seconds: float) -> dict[str, Any]:
        return {"code": code, **dict.fromkeys(SECONDS, seconds)}

    rows = [row(BEFORE, 4.0), row(NOW, 2.0), row(BEFORE, 4.0), row(NOW, 3.0), row(NOW, 99.0)]
    assert ratios(rows) == dict.fromkeys(SECONDS, 0.75)


def test_a_run_that_fails_names_its_checkout(tmp_path: Path) -> None:
    (tmp_path / "fedpet").mkdir()
    (tmp_path / "fedpet" / "__init__.py").write_text("raise ImportError('a broken one')")
    with pytest.raises(RuntimeError, match=r"(?s)the job of .* failed.*a broken one"):
        run_job(tmp_path, [])
    with pytest.raises(RuntimeError, match=r"the rounds of .* ended with 1"):
        round_overhead.measure(tmp_path, 1, 3, next(iter(CODECS)))


def test_what_a_checkout_runs_imports_nothing_of_the_benchmarks() -> None:
    text = (Path(benchmarks.__file__).parent / "noisy_rounds.py").read_text(encoding="utf-8")
    assert "from benchmarks" not in text
    assert "import benchmarks" not in text
