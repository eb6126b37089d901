"""Test the refusals of a search: law 7, a wrong reply, by name; impossible settings, at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from in_process_run import run
from search_runs import lines_of, structure_of
from tiny import Silent

from fedpet.backbone.pretrained import load_backbone
from fedpet.client.node import Node
from fedpet.client.node_config import NodeConfig
from fedpet.errors import ConfigError, RunError, StructureError, TrainingError
from fedpet.protocol.frame import Frame, pack_frame, unpack_frames
from fedpet.protocol.plan import Plan
from fedpet.protocol.request import read_request
from fedpet.run.federate import PreparedSearch, prepare
from fedpet.run.local_grid import LocalGrid
from fedpet.search import SearchModel
from fedpet.utils.seeds import client_id64

# -- law 7: a wrong reply ------------------------------------------------------------------------


def spoil(
    node: Callable[[bytes], bytes], change: Callable[[Frame], bytes]
) -> Callable[[bytes], bytes]:
    """A node whose answers of the search for client 2 are changed on their way."""

    def answer(payload: bytes) -> bytes:
        out, whole = [], node(payload)
        plan = read_request(payload).plan
        is_search.append(bool(plan) and Plan.from_bytes(plan).search is not None)
        for frame in unpack_frames(whole, max_frames=99, max_payload_bytes=len(whole)):
            assert isinstance(frame, Frame)
            spoiled = is_search[0] and len(is_search) == 1 and frame.client == VICTIM
            out.append(change(frame) if spoiled else pack_frame(frame))
        return b"".join(out)

    is_search: list[bool] = []
    return answer


VICTIM = client_id64("client 2")
WRONG: dict[str, Callable[[Frame], bytes]] = {
    "values by": lambda f: pack_frame(replace(f, count=f.count - 1)),
    "is of plan": lambda f: pack_frame(replace(f, plan_digest=b"\1" * 16)),
    "is of round 2": lambda f: pack_frame(replace(f, server_round=2)),
    "may have a payload": lambda f: pack_frame(replace(f, payload=bytes(9 * f.count + 5000))),
    "bytes": lambda f: pack_frame(replace(f, payload=bytes(f.payload) + b"more")),
}


@pytest.mark.parametrize("word", WRONG)
def test_a_wrong_reply_of_a_search_is_refused_by_name_and_the_round_goes_on(
    experiment: Any, word: str
) -> None:
    settings = experiment(search_rounds=2)
    # The victim is alone on its node, so that a reply that cannot be read at all is its own.
    alone = spoil(Node(NodeConfig.from_experiment(settings)).answer, WRONG[word])
    grid = LocalGrid({n: spoil(Node(NodeConfig.from_experiment(settings)).answer, WRONG[word])
                      for n in range(1, 6)} | {6: alone})  # fmt: skip
    result = run(settings, grid)
    [refused] = result["refused"]
    assert refused["kind"] == "search"
    assert refused["who"] == "client 2"
    assert word in refused["reason"]
    first, *rest = lines_of(Path(settings.run.out), "search")
    assert (first["clients"], first["replies"], first["aggregated"]) == (6, 5, True)
    assert all(line["replies"] == 6 for line in rest)


def test_a_client_whose_search_gives_nan_is_refused_by_name(
    experiment: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = SearchModel.search_rows

    def search_rows(self: SearchModel, *args: Any, **kwargs: Any) -> Any:
        trained = honest(self, *args, **kwargs)
        if kwargs["server_round"] == 2:
            self.alpha[3] = math.nan
        return trained

    monkeypatch.setattr(SearchModel, "search_rows", search_rows)
    settings = experiment()
    result = run(settings)
    assert len(result["refused"]) == 6
    assert {entry["round"] for entry in result["refused"]} == {2}
    assert "NaN" in result["refused"][0]["reason"]
    told = structure_of(Path(settings.run.out)).provenance["search"]
    assert (told["rounds"], told["averaged"]) == (3, 2)


def test_a_search_without_a_usable_reply_ends_the_run_and_says_why(
    experiment: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: SearchModel, *args: Any, **kwargs: Any) -> Any:
        raise TrainingError("a loss became nan at step 1 of the search.")

    monkeypatch.setattr(SearchModel, "search_rows", broken)
    with pytest.raises(RunError, match="no round of the search met its quorum"):
        run(experiment())


def test_a_plan_of_a_search_with_another_layout_is_refused_by_the_node(
    searching: PreparedSearch, files: tuple[Path, Path]
) -> None:
    plan = searching.plan
    assert Plan.from_bytes(plan.to_bytes()) == plan
    assert plan.search is not None
    other = replace(plan, search=replace(plan.search, rank=2))
    backbone = load_backbone(searching.experiment.backbone, num_outputs=2)
    with pytest.raises(Exception, match="the layout here has"):
        other.build_search(backbone)


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"search_budget": 5}, StructureError, "must hold at least the smallest candidate"),
        ({"search_budget": 10**7}, StructureError, "must be below the .* values of the whole"),
        ({"structure_file": "found.json"}, ConfigError, "structure.file names 'found.json': leave"),
        ({"search_method": "random"}, ConfigError, "search.federated searches by 's3pet'"),
        ({"search_rounds": 0}, ConfigError, "search.rounds must be at least 1"),
        ({"search_settled_overlap": 0.0}, ConfigError, r"settled-overlap must be in \(0, 1\]"),
        ({"strategy_name": "krum"}, ConfigError, "averages what clients send, and strategy 'krum'"),
        (
            {"search_mask_in_budget": True, "mask_density": 0.5},
            StructureError,
            "the budget of 600 values must hold the mask",
        ),
        (
            {"search_budget": "2kB", "codec_uplink": "topk-0.1+int8"},
            ConfigError,
            "sends every value",
        ),
    ],
)
def test_bad_input_is_told_in_a_sentence_before_anything_runs(
    experiment: Any, changes: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        prepare(experiment(**changes), Silent())


def test_a_cost_that_depends_on_the_search_is_not_estimated(experiment: Any) -> None:
    from fedpet.estimate import estimate

    with pytest.raises(ConfigError, match=r"search\.federated finds it in the run"):
        estimate(experiment())
