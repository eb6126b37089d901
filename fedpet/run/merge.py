"""Put a finished run's values on its backbone again, or fold them into a plain model.

In:  a run folder.
Out: a `PetModel` at the final values; or the folder of the plain model.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from fedpet.backbone.pretrained import load_for_task, locate
from fedpet.config import Experiment
from fedpet.data.tokenize import probe_rows
from fedpet.errors import ConfigError
from fedpet.pet.model import PetModel
from fedpet.protocol.plan import Plan
from fedpet.run.run_folder import write_model
from fedpet.training.input_checks import settle_padding
from fedpet.utils.lock import LOCK_FILE, locked_folder

__all__ = ["load_trained", "merge_run"]

VALUES_FILE = "checkpoint/values.npy"


def load_trained(run: Path) -> PetModel:
    """Load a run's backbone and set its trainables to the run's final values.

    Raises:
        ConfigError: `run` is no finished run folder.
        BackboneError: The run's checkpoint is not to be had here.
        PlanError: The checkpoint here is another than the run's.
    """
    _check_finished(run)
    experiment = Experiment.from_file(run / "config.toml")
    plan = Plan.from_bytes((run / "plan.bin").read_bytes())
    backbone = load_for_task(plan.backbone(experiment.backbone), plan.task)
    settle_padding(backbone.model, probe_rows(locate(experiment.backbone)))
    pet = plan.build(backbone)
    values = np.load(run / VALUES_FILE, allow_pickle=False)
    pet.load_values(torch.from_numpy(values), seed=plan.seed)
    return pet


def merge_run(run: Path, out: Path) -> None:
    """Write the plain Hugging Face folder of a run.

    Raises:
        ConfigError: `run` is no finished run folder, or `out` exists.
        BackboneError: The run's checkpoint is not to be had here.
        PlanError: The checkpoint here is another than the run's.
        RunError: The folder cannot be written.
    """
    _check_finished(run)
    with locked_folder(out):
        if any(path.name != LOCK_FILE for path in out.iterdir()):
            raise ConfigError(f"the folder {str(out)!r} is not empty: name another with --out.")
        experiment = Experiment.from_file(run / "config.toml")
        write_model(load_trained(run).merged(), locate(experiment.backbone), out)


def _check_finished(run: Path) -> None:
    for path in (run / "config.toml", run / "plan.bin", run / VALUES_FILE):
        if not path.exists():
            raise ConfigError(
                f"{str(run)!r} is no folder of a finished run: {path.name} is absent."
            )
