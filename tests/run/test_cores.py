"""The server computes on the cores that it was given, not on all that the machine has."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from in_process_run import run

from fedpet.config import Experiment
from fedpet.utils.cores import usable_cores


@pytest.mark.parametrize(("told", "cores"), [("3", 3), ("5,2", 5), (" 2 ", 2)])
def test_omp_num_threads_is_kept_to(told: str, cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", told)
    assert usable_cores() == cores


@pytest.mark.parametrize("told", ["", "0", "many"])
def test_the_process_s_own_cores_are_kept_to(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", told)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {4, 9, 11}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert usable_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    assert usable_cores() == 64


def test_the_server_of_a_run_takes_no_more_threads_than_it_was_given(
    experiment: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    run(experiment(strategy_num_rounds=1))
    assert taken[0] == 3
