"""Plans and state on a device stay within its quota: what was not used for longest goes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from fedpet.client.disk_quota import make_room
from fedpet.client.plan_store import PlanStore
from fedpet.client.state_store import StateStore, state_folder
from fedpet.errors import PlanError
from fedpet.protocol.plan import Plan


def put(store: PlanStore, content: bytes, age: float) -> Path:
    digest = Plan.digest(content)
    store.put(content, digest)
    path = store.path(digest)
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime - age))
    return path


def test_a_plan_takes_the_place_of_the_one_used_least_lately(tmp_path: Path) -> None:
    store = PlanStore(tmp_path, quota=250)
    old = put(store, b"a" * 100, 50)
    older = put(store, b"b" * 100, 90)
    new = put(store, b"c" * 100, 0)
    assert [path.exists() for path in (older, old, new)] == [False, True, True]


def test_a_plan_beyond_the_quota_is_refused_and_not_written(tmp_path: Path) -> None:
    store = PlanStore(tmp_path, quota=99)
    with pytest.raises(PlanError, match="its owner may raise max-disk-mib"):
        store.put(b"a" * 100, Plan.digest(b"a" * 100))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_run_s_state_counts_and_the_run_in_use_stays(tmp_path: Path) -> None:
    values = np.zeros(100, dtype=np.float32)
    runs = [state_folder(tmp_path, b"p" * 16, number) for number in (1, 2)]
    for age, folder in ((100, runs[0]), (0, runs[1])):
        StateStore(folder, quota=2000).keep_residual(7, 1, values, accepted=0)
        os.utime(folder, (1e9, folder.stat().st_mtime - age))
    assert [folder.exists() for folder in runs] == [True, True]
    StateStore(runs[1], quota=1400).keep_residual(8, 1, values, accepted=0)
    assert [folder.exists() for folder in runs] == [False, True]
    with pytest.raises(PlanError, match="1400"):
        StateStore(runs[1], quota=1400).keep_residual(9, 1, values, accepted=0)
    StateStore(runs[1], quota=1400).keep_residual(8, 2, values, accepted=0)  # in its own place


def test_without_a_quota_nothing_goes(tmp_path: Path) -> None:
    put(PlanStore(tmp_path), b"a" * 100, 90)
    make_room(tmp_path, 1 << 60, 0, keep=tmp_path)
    assert len(list(tmp_path.rglob("*.plan"))) == 1
