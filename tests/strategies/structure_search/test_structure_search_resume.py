"""A run cut short in its search, or after it, goes on to the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from in_process_run import run
from search_runs import SEARCH, lines_of, structure_of
from tiny import Silent

from fedpet.client.node_config import NodeConfig
from fedpet.pet.structure import Structure
from fedpet.run.checkpoint_file import read_journal
from fedpet.run.federate import PreparedSearch, federate, prepare
from fedpet.run.local_grid import LocalGrid
from fedpet.run.resume import check_journal, read_cut_short, searched_structure
from fedpet.run.run_folder import RunFolder

LOSSY = {"codec_uplink": "eden-4", "codec_downlink": "eden-4"}
TWO_ROUNDS = {"strategy_num_rounds": 2}


@pytest.fixture(scope="module")
def whole(
    files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[dict[str, Any]], tuple[Path, dict[str, Any]]]:
    """Runs that were not cut short, each made once: folder and result."""
    done: dict[str, tuple[Path, dict[str, Any]]] = {}

    def make(changes: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
        key = repr(changes)
        if key not in done:
            out = tmp_path_factory.mktemp("whole") / "run"
            found = run(tiny.make_experiment(*files, out, **{**SEARCH, **TWO_ROUNDS, **changes}))
            done[key] = out, found
        return done[key]

    return make


@pytest.mark.parametrize(("changes", "stop"), [({}, 1), ({}, 3), ({}, 4), ({}, 5), (LOSSY, 2)])
def test_a_run_cut_short_in_or_after_its_search_goes_on_to_the_same_bytes(
    experiment: Any, whole: Any, stop: int, changes: dict[str, Any]
) -> None:
    out, expected = whole(changes)

    class Stops(LocalGrid):
        def pull_messages(self, message_ids: Any) -> Any:
            replies = super().pull_messages(message_ids)
            self.rounds = getattr(self, "rounds", 0) + bool(replies)
            if self.rounds == stop:
                raise KeyboardInterrupt
            return replies

    cut = experiment(**TWO_ROUNDS, **changes)
    with pytest.raises(KeyboardInterrupt):
        run(cut, Stops.of(NodeConfig.from_experiment(cut), 1))
    result = gone_on_with(Path(cut.run.out))
    assert result["final_values_sha256"] == expected["final_values_sha256"]
    assert result["run"]["resumed"] == (stop > 1)  # before the first journal it begins again
    for name in ("uplink_bytes", "downlink_bytes", "plan_bytes"):
        assert result["communication"][name] == expected["communication"][name]
    text = [(folder / "structure.json").read_bytes() for folder in (out, Path(cut.run.out))]
    assert text[0] == text[1]


def gone_on_with(out: Path) -> dict[str, Any]:
    settings = read_cut_short(out)
    prepared = prepare(settings, Silent(), structure=searched_structure(out))
    grid = LocalGrid.of(NodeConfig.from_experiment(settings), 1)
    return federate(grid, prepared, RunFolder(out), Silent(), check_journal(out, prepared))


def test_a_run_killed_between_its_search_and_its_training_keeps_the_search_s_books(
    experiment: Any, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, expected = whole({})
    cut = experiment(**TWO_ROUNDS)

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(PreparedSearch, "with_structure", stop)
        with pytest.raises(KeyboardInterrupt):
            run(cut)
    out = Path(cut.run.out)
    journal = read_journal(out)
    assert journal is not None
    assert journal.kind == "search"
    assert searched_structure(out) == structure_of(out)
    result = gone_on_with(out)
    assert result["final_values_sha256"] == expected["final_values_sha256"]
    assert len(lines_of(out, "search")) == 3


def test_a_structure_s_file_that_the_search_did_not_leave_does_not_end_it(experiment: Any) -> None:
    cut = experiment()

    class Stops(LocalGrid):
        def push_messages(self, messages: Any) -> Any:
            self.rounds = getattr(self, "rounds", 0) + 1
            if self.rounds == 2:
                raise KeyboardInterrupt
            return super().push_messages(messages)

    with pytest.raises(KeyboardInterrupt):
        run(cut, Stops.of(NodeConfig.from_experiment(cut), 1))
    out = Path(cut.run.out)
    (out / "structure.json").write_text(Structure().to_json(), encoding="utf-8")
    assert searched_structure(out) is None
    gone_on_with(out)
    assert structure_of(out).modules
