"""Reasons that leave a device quote nothing of its rows; its own log has them whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from roll_call_runs import on_nodes
from tiny import Silent

from fedpet.client.node import Node
from fedpet.client.node_config import NodeConfig
from fedpet.client.refusal_reason import reason_for_server
from fedpet.config import Experiment
from fedpet.errors import AbsentDataError, DataError, PlanError
from fedpet.protocol.frame import unpack_frames
from fedpet.protocol.plan import Plan
from fedpet.protocol.request import Request, write_request
from fedpet.run.prepare import prepare

SECRET = "the diagnosis is F32"


@pytest.fixture
def settings(experiment: Callable[..., Experiment]) -> Experiment:
    return on_nodes(experiment)


def asked(settings: Experiment, plan: Plan, rows: Path, **config: Any) -> str:
    node = Node(NodeConfig.from_experiment(settings, {"data": str(rows), **config}))
    answer = node.answer(write_request(Request((), b"", plan.to_bytes())))
    [part] = unpack_frames(answer, max_frames=1, max_payload_bytes=0)
    return str(part.reason)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "rows",
    [
        '{"text": "a film", "label": "%s"}\n',  # a label that no plan knows
        '{"text": "a film", "label": "good", "%s": 1}\n{"%s\n',  # a line that does not parse
        '{"%s": "a film", "label": "good"}\n',  # a column's name
    ],
)
def test_no_value_of_a_row_leaves_by_a_refusal(
    settings: Experiment, tmp_path: Path, rows: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(rows.replace("%s", SECRET))
    reason = asked(settings, prepare(settings, Silent()).plan, path, client="c")
    assert reason == "its rows cannot be used as the plan asks: the node's log says why."
    assert "the registration was refused: " in caplog.text


def test_a_plan_that_names_a_text_a_label_learns_no_other_text(
    settings: Experiment, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"text": "{SECRET}", "label": "x"}}\n{{"text": "more", "label": "y"}}\n')
    plan = prepare(settings, Silent()).plan
    column = replace(settings, data=replace(settings.data, label_column="text"))
    for names in (("a", "b"), (SECRET, "b")):
        guessing = replace(plan, task=replace(plan.task, label_names=names))
        assert "more" not in asked(column, guessing, path, client="c")
        assert SECRET not in asked(column, guessing, path, client="c")
        pinned = asked(column, guessing, path, client="c", **{"label-column": "label"})
        assert SECRET not in pinned


def test_what_quotes_no_row_is_told_whole(settings: Experiment, tmp_path: Path) -> None:
    gone = asked(settings, prepare(settings, Silent()).plan, tmp_path / "gone.jsonl", client="c")
    assert "there is no file or folder" in gone
    for error in (
        PlanError("another checkpoint"),
        AbsentDataError("no file"),
        OSError("disk full"),
    ):
        assert reason_for_server(error, 1, own_rows=True) == str(error)


def test_rows_that_are_the_server_s_own_are_told_whole() -> None:
    assert reason_for_server(DataError(SECRET), 1, own_rows=False) == SECRET
