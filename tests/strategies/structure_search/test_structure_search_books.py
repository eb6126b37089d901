"""Test what a search leaves: bytes told apart, provenance, gates on the page, a plain model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from in_process_run import run
from search_runs import BUDGET, lines_of, structure_of

from fedpet.backbone.pretrained import load_backbone
from fedpet.protocol.plan import Plan
from fedpet.report.gate_tables import gate_map, structure_facts
from fedpet.report.loading import read_report
from fedpet.report.page import page


def test_the_bytes_of_a_search_are_those_of_its_messages_and_told_apart(experiment: Any) -> None:
    settings = experiment()
    result = run(settings, nodes=6)
    books = result["communication"]
    search, training = books["by_kind"]["search"], books["by_kind"]["training"]
    # One client a node; the ids in a message's metadata are shorter here than between machines.
    assert search["total_bytes"] == pytest.approx(search["wire_bytes"], rel=0.02)
    assert training["total_bytes"] == pytest.approx(training["wire_bytes"], rel=0.02)
    assert (search["rounds"], training["rounds"]) == (3, 1)
    sent = books["wire_by_kind"]
    kinds = {f"{kind} {way}" for kind in ("search", "train") for way in ("up", "down")}
    assert set(sent) == kinds | {"plan down"}
    assert sent["search up"] + sent["search down"] < search["wire_bytes"]  # the rest is the plan
    assert (search["messages"], training["messages"]) == (36, 12)
    for name in ("uplink_bytes", "downlink_bytes", "plan_bytes", "wire_bytes", "total_bytes"):
        assert books[name] == search[name] + training[name]
    out = Path(settings.run.out)
    for kind in ("search", "training"):
        for name in ("uplink_bytes", "downlink_bytes", "plan_bytes"):
            lines = lines_of(out, kind)
            assert sum(line[name] for line in lines) == books["by_kind"][kind][name]
    told = structure_of(out).provenance["search"]
    assert [told[name] for name in ("uplink_bytes", "downlink_bytes", "plan_bytes")] == [
        search[name] for name in ("uplink_bytes", "downlink_bytes", "plan_bytes")
    ]
    assert books["uplink_bytes_per_client_round"] == training["uplink_bytes"] / 6


@pytest.mark.parametrize(
    "changes",
    [
        {"codec_uplink": "eden-4", "codec_downlink": "eden-4"},
        {
            "codec_uplink": "topk-0.5+int8",
            "codec_head_uplink": "float32",
            "codec_error_feedback": True,
        },
        {"mask_tiers": "0.01=0.5,0.05=0.5"},
        {"mask_enabled": False, "mask_broadcast": "send"},
        {"strategy_name": "fedadam"},
    ],
)
def test_a_search_takes_codec_tiers_and_mask_as_training_does(
    experiment: Any, changes: dict[str, Any]
) -> None:
    settings = experiment(**changes)
    result, again = run(settings), run(experiment(**changes), nodes=3)
    assert result["refused"] == []
    assert result["final_values_sha256"] == again["final_values_sha256"]
    assert not list((Path(settings.run.cache) / "state").glob("*/*"))


def test_the_structure_tells_how_it_was_found_and_the_page_shows_its_gates(
    experiment: Any, files: tuple[Path, Path]
) -> None:
    settings = experiment(search_space="s3pet-mix")
    result = run(settings)
    out = Path(settings.run.out)
    structure = structure_of(out)
    told = structure.provenance
    assert told["method"] == "s3pet"
    assert told["federated"] is True
    assert told["search"]["clients"] == 6
    assert told["data"] == {"source": str(files[1]), "split": "train", "rows": 72}
    assert {"lora-factors", "lowrank-adapter"} <= set(told["inexact_kinds"])
    assert any("not exact" in text for text in told["deviations"])
    assert "last checkpoint" in told["deviations"]
    assert result["model"]["structure_values"] == told["values"] <= BUDGET
    gates = gate_map(structure)
    assert gates is not None
    assert sum(gate.chosen for gate in gates.cells.values()) == len(structure.modules)
    facts = dict(structure_facts(structure))
    assert "3 rounds of at most 3 on 6 clients" in facts["searched in"]
    text = page(read_report(out))
    assert "Gates of the search" in text
    assert text.count('class="chosen"') == len(structure.modules)
    assert "of it in 3 rounds of a search" in text
    assert ">search 3<" in text


def test_the_model_after_search_and_training_is_plain_and_gives_the_adapted_outputs(
    experiment: Any,
) -> None:
    from transformers import AutoModelForSequenceClassification

    settings = experiment(strategy_num_rounds=2)
    result = run(settings)
    assert result["model"]["inference_parameters_added"] == 0
    out = Path(settings.run.out)
    saved = AutoModelForSequenceClassification.from_pretrained(out / "model").eval()
    plan = Plan.from_bytes((out / "plan.bin").read_bytes())
    assert plan.search is None
    pet = plan.build(load_backbone(settings.backbone, num_outputs=2))
    pet.set_delta(torch.from_numpy(np.load(out / "checkpoint" / "values.npy")), seed=plan.seed)
    ids = torch.tensor([[2, 5, 9, 7, 3], [2, 6, 11, 8, 3]])
    with torch.no_grad():
        adapted, plain = pet.model.eval()(ids).logits, saved(ids).logits
    assert torch.allclose(adapted, plain, atol=1e-5)
