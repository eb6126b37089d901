"""Law 6 across versions: small federations end in the values that are on record.

    RECORD=1 pytest tests/run/test_recorded_values.py     records them, where they moved on purpose

The values are the same on one type of processor and by the same packages. So tests/golden.json
names both, and elsewhere the tests are skipped; others test that a run repeats itself there.
`scripts/golden` does the same with more federations, through the command line and on Ray.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from in_process_run import run

from fedpet.config import CodecConfig, Experiment
from fedpet.run.run_folder import machine, versions

RECORD = Path(__file__).parents[1] / "golden.json"
DEFAULT_CODEC = {
    f"codec_{key}": getattr(CodecConfig(), key) for key in ("uplink", "downlink", "downlink_mode")
}
FEDERATIONS: dict[str, dict[str, Any]] = {
    "present defaults": {**DEFAULT_CODEC, "strategy_num_rounds": 2},
    "clients at once": {**DEFAULT_CODEC, "training_clients_at_once": 3, "strategy_num_rounds": 2},
    "padded, lossless": {"training_padding_free": False, "strategy_num_rounds": 2},
    "tiers, feedback": {
        "mask_tiers": ["0.01=0.5", "0.05=0.5"],
        "codec_uplink": "topk-0.2+eden-4",
        "codec_error_feedback": True,
        "codec_downlink": "int8",
        "strategy_num_rounds": 2,
    },
    "federated search": {
        "structure_preset": "none",
        "search_federated": True,
        "search_rounds": 1,
        "search_local_steps": 1,
        "search_budget": 200,
        "search_batch_size": 4,
        "strategy_num_rounds": 1,
    },
}


def made_by() -> dict[str, str]:
    """Name all that the bits depend on beside the code."""
    return {
        "processor": f"{machine()['processor']}, {torch.backends.cpu.get_cpu_capability()}",
        **{name: versions()[name] for name in ("torch", "numpy", "transformers")},
    }


@pytest.mark.parametrize("name", FEDERATIONS)
def test_a_federation_ends_in_the_values_on_record(
    name: str, experiment: Callable[..., Experiment]
) -> None:
    known = json.loads(RECORD.read_text(encoding="utf-8"))
    if "RECORD" not in os.environ and known["made_by"] != made_by():
        pytest.skip(f"recorded by {known['made_by']}")
    found = run(experiment(**FEDERATIONS[name]))["final_values_sha256"]
    if "RECORD" in os.environ:
        known["made_by"], known["final_values_sha256"][name] = made_by(), found
        RECORD.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    assert found == known["final_values_sha256"][name]
