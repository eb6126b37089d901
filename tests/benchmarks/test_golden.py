"""`scripts/golden`: values that moved fail a check, bytes that moved are only told."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

NAMES = ["packaged-model", "tiers"]


@pytest.fixture
def golden(repository: Path) -> Any:
    loader = SourceFileLoader("golden", str(repository / "scripts" / "golden"))
    spec = spec_from_loader("golden", loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture
def call(golden: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Calls the script with runs that end with these numbers."""

    def call(what: str, **changes: Any) -> int:
        class Runs:
            def __init__(self, *arguments: Any) -> None: ...

            def of(self, name: str) -> dict[str, Any]:
                if changes.get("failed") == name:
                    raise golden.Failed("it did not end")
                known = dict.fromkeys((*golden.VALUES, *golden.BOOKS), 1)
                return {**known, "final_values_sha256": name, **changes}

        monkeypatch.setattr(golden, "Runs", Runs)
        only = [part for name in NAMES for part in ("--only", name)]
        monkeypatch.setattr(sys, "argv", ["golden", what, str(tmp_path / "file.json"), *only])
        return int(golden.main())

    assert call("--write") == 0
    return call


def test_what_did_not_move_passes(call: Callable[..., int]) -> None:
    assert call("--check") == 0


@pytest.mark.parametrize("key", ["final_values_sha256", "model_sha256", "metric_by_round"])
def test_values_that_moved_fail(
    call: Callable[..., int], key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("--check", **{key: "other"}) == 1
    values, _, books = capsys.readouterr().out.partition("Bytes and plans that differ")
    assert key in values
    assert key not in books


@pytest.mark.parametrize("key", ["plan_digest", "total_bytes", "plan_bytes", "wire_bytes"])
def test_bytes_that_moved_are_told_and_pass(
    call: Callable[..., int], key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("--check", **{key: 3}) == 0
    values, _, books = capsys.readouterr().out.partition("Bytes and plans that differ")
    assert key in books
    assert key not in values


def test_a_run_that_failed_fails_and_the_others_go_on(
    call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("--check", failed="packaged-model") == 1
    said = capsys.readouterr().out
    assert "it did not end" in said
    assert "tiers  " in said


def test_numbers_are_found_wherever_a_result_holds_them(golden: Any) -> None:
    assert golden.lookup({"a": {"wire_bytes": 1}, "b": {"c": {"wire_bytes": 2}}}, "wire_bytes") == 1
    assert golden.lookup({"books": {"wire_bytes": 3}}, "wire_bytes") == 3
    assert golden.lookup({"a": 1}, "wire_bytes") is None


def test_a_models_digest_is_of_its_numbers_alone(golden: Any, tmp_path: Path) -> None:
    one = {"a": np.ones(2, np.float32), "b": np.zeros((1, 2), np.float32)}
    save_file(one, tmp_path / "one", metadata={"format": "pt"})
    save_file(dict(reversed(one.items())), tmp_path / "two")
    save_file(one | {"b": np.full((1, 2), 1e-7, np.float32)}, tmp_path / "three")
    digests = [golden.model_digest(tmp_path / name) for name in ("one", "two", "three")]
    assert digests[0] == digests[1] != digests[2]
