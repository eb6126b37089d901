"""A finished run's values folded into a plain model once more, from its plan and checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from fedpet.backbone import load_for_task, locate
from fedpet.config import Experiment
from fedpet.data.tokenise import probe_rows
from fedpet.errors import ConfigError
from fedpet.inputs import settle_padding
from fedpet.plan import Plan

from .run_folder import write_model


def merge_run(run: Path, out: Path) -> None:
    """Write the plain Hugging Face folder of a run.

    Raises:
        ConfigError: `run` is no finished run folder, or `out` exists.
        BackboneError: The run's checkpoint is not to be had here.
        PlanError: The checkpoint here is another than the run's.
        RunError: The folder cannot be written.
    """
    values_file = run / "checkpoint" / "values.npy"
    for path in (run / "config.toml", run / "plan.bin", values_file):
        if not path.exists():
            raise ConfigError(
                f"{str(run)!r} is no folder of a finished run: {path.name} is absent."
            )
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"{str(out)!r} is there, and no empty folder: name another with --out.")
    experiment = Experiment.from_file(run / "config.toml")
    plan = Plan.from_bytes((run / "plan.bin").read_bytes())
    backbone = load_for_task(plan.backbone(experiment.backbone), plan.task)
    folder = locate(experiment.backbone)
    settle_padding(backbone.model, probe_rows(folder))
    pet = plan.build(backbone)
    values = np.load(values_file, allow_pickle=False)
    pet.load_values(torch.from_numpy(values), seed=plan.seed)
    write_model(pet.merged(), folder, out)
