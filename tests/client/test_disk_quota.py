"""Plans and state on a device stay within its quota: what was not used for longest goes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from roll_call_runs import on_nodes
from tiny import Silent

from fedpet.client.disk_quota import make_room
from fedpet.client.model_cache import ModelCache
from fedpet.client.node_config import NodeConfig
from fedpet.client.plan_store import PlanStore
from fedpet.client.state_store import StateStore, state_folder
from fedpet.config import Experiment
from fedpet.errors import PlanError
from fedpet.protocol.plan import Plan
from fedpet.run.prepare import prepare


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


def test_what_was_made_of_rows_that_are_gone_goes_with_them(
    experiment: Callable[..., Experiment], tmp_path: Path
) -> None:
    settings = on_nodes(experiment)
    plan = prepare(settings, Silent()).plan
    path, old = tmp_path / "rows.jsonl", '{"text": "good film", "label": "%s"}\n'
    label = plan.task.label_names[0]
    for own in (True, False):
        cache = {"cache": str(tmp_path / "own")} if own else {}
        config = NodeConfig.from_experiment(settings, {"data": str(path), "client": "c", **cache})
        kept = []
        for rows in (3, 2, 2):
            path.write_text(old % label * rows)
            os.utime(path, (1e9 + rows, 1e9 + rows))
            for entry in (config.cache / "rows").glob("*"):
                os.utime(entry, (1e9, 1e9))
            ModelCache(config, PlanStore(config.cache)).load_rows(plan)
            kept.append(len(list((config.cache / "rows").glob("*"))))
        assert kept == ([1, 1, 1] if own else [kept[0], kept[0] + 1, kept[0] + 1])
