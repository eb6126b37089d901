"""A finished run's values folded into a plain model once more, from its plan and checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from fedpet.backbone.pretrained import load_for_task, locate
from fedpet.config import Experiment
from fedpet.data.tokenize import probe_rows
from fedpet.errors import ConfigError
from fedpet.protocol.plan import Plan
from fedpet.run.run_folder import write_model
from fedpet.training.input_checks import settle_padding
from fedpet.utils.lock import LOCK_FILE, locked_folder

VALUES_FILE = "checkpoint/values.npy"


def merge_run(run: Path, out: Path) -> None:
    """Write the plain Hugging Face folder of a run.

    Raises:
        ConfigError: `run` is no finished run folder, or `out` exists.
        BackboneError: The run's checkpoint is not to be had here.
        PlanError: The checkpoint here is another than the run's.
        RunError: The folder cannot be written.
    """
    values_file = run / VALUES_FILE
    for path in (run / "config.toml", run / "plan.bin", values_file):
        if not path.exists():
            raise ConfigError(
                f"{str(run)!r} is no folder of a finished run: {path.name} is absent."
            )
    with locked_folder(out):
        if any(path.name != LOCK_FILE for path in out.iterdir()):
            raise ConfigError(f"the folder {str(out)!r} is not empty: name another with --out.")
        _merge(run, out)


def _merge(run: Path, out: Path) -> None:
    experiment = Experiment.from_file(run / "config.toml")
    plan = Plan.from_bytes((run / "plan.bin").read_bytes())
    backbone = load_for_task(plan.backbone(experiment.backbone), plan.task)
    folder = locate(experiment.backbone)
    settle_padding(backbone.model, probe_rows(folder))
    pet = plan.build(backbone)
    values = np.load(run / VALUES_FILE, allow_pickle=False)
    pet.set_delta(torch.from_numpy(values), seed=plan.seed)
    write_model(pet.merged(), folder, out)
