"""README.md against what it speaks of."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from fedpet.config import Experiment
from fedpet.config.renamed import with_new_names


def test_every_measured_block_says_what_its_result_file_says(repository: Path) -> None:
    program = [sys.executable, str(repository / "scripts" / "readme"), "--check"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_every_target_it_names_is_in_the_makefile(repository: Path) -> None:
    text = (repository / "README.md").read_text(encoding="utf-8")
    makefile = (repository / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"\bmake ([a-z]+(?:-[a-z]+)*)", text)) - {"it"}
    assert {"run", "test", "check"} <= named
    missing = {name for name in named if not re.search(rf"^{name}:", makefile, re.MULTILINE)}
    assert not missing


def test_what_it_shows_of_make_run_is_a_run_of_the_shipped_experiment(repository: Path) -> None:
    told = repository / "benchmarks" / "results" / "make-run" / "config.toml"
    shipped = repository / "simulations" / "experiments" / "film-reviews.toml"
    tables = with_new_names(tomllib.loads(told.read_text(encoding="utf-8")))
    asked = Experiment.from_file(shipped)
    if asked.training.matmul_backend == "auto":  # which the run has decided
        tables["training"]["matmul-backend"] = "auto"
    assert Experiment.from_tables(tables) == asked
