"""Read a finished run again, from its plan and checkpoint, and export it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedpet.backbone.pretrained import load_for_task, locate
from fedpet.config import Experiment
from fedpet.data.tokenize import probe_rows
from fedpet.errors import ConfigError
from fedpet.export.model_card import write_card
from fedpet.export.peft_adapter import write_adapter
from fedpet.export.plain_model import write_model
from fedpet.protocol.plan import Plan
from fedpet.training.input_checks import settle_padding
from fedpet.utils.lock import LOCK_FILE, locked_folder

if TYPE_CHECKING:
    from fedpet.pet.model import PetModel

__all__ = ["FORMATS", "SavedRun", "export_run", "merge_run"]

FORMATS = ("merged", "peft")
VALUES_FILE = "checkpoint/values.npy"


def export_run(run: Path, out: Path, format: str = "merged") -> None:
    """Write what a run has trained as a folder that other tools read.

    Args:
        run: Its folder.
        out: To make; nothing is written over.
        format: "merged", a plain Hugging Face model; or "peft", an adapter.

    Raises:
        ConfigError: `run` is no finished run folder, `out` holds something, another format, or one
            that cannot express what was trained.
        BackboneError: The run's checkpoint is not to be had here.
        PlanError: The checkpoint here is another than the run's.
        RunError: The folder cannot be written.
    """
    if format not in FORMATS:
        raise ConfigError(f"the format must be one of {', '.join(FORMATS)}, got {format!r}.")
    saved = SavedRun(run)
    with _empty(out):
        pet = saved.load()
        if format == "peft":
            peft_type, notes = write_adapter(pet, out, saved.experiment.backbone.model)
        else:
            peft_type, notes = "", ()
            write_model(pet.merge_and_unload(), locate(saved.experiment.backbone), out)
        if (result := saved.result()) is not None:
            write_card(out, saved.experiment, result, peft_type=peft_type, notes=notes)


def merge_run(run: Path, out: Path) -> None:
    """Write the plain Hugging Face folder of a run; raises as `export_run`."""
    export_run(run, out, "merged")


@dataclass(frozen=True)
class SavedRun:
    """A folder in which a run has ended.

    Raises:
        ConfigError: It is none.
    """

    path: Path

    def __post_init__(self) -> None:
        for name in ("config.toml", "plan.bin", VALUES_FILE):
            if not (self.path / name).exists():
                raise ConfigError(
                    f"{str(self.path)!r} is no folder of a finished run: {Path(name).name} is "
                    "absent."
                )

    @property
    def experiment(self) -> Experiment:
        return Experiment.of_run(self.path)

    @property
    def plan(self) -> Plan:
        return Plan.from_bytes((self.path / "plan.bin").read_bytes())

    @property
    def values(self) -> np.ndarray:
        """Return the last global values, float32, (num_values,)."""
        values: np.ndarray = np.load(self.path / VALUES_FILE, allow_pickle=False)
        return values

    def result(self) -> dict[str, Any] | None:
        """Return the content of `result.json`, if it is there."""
        file = self.path / "result.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def load(self) -> PetModel:
        """Put the values on the checkpoint again."""
        experiment, plan = self.experiment, self.plan
        backbone = load_for_task(plan.backbone(experiment.backbone), plan.task)
        settle_padding(backbone.model, probe_rows(locate(experiment.backbone)))
        pet = plan.build(backbone)
        pet.set_delta(torch.from_numpy(self.values), seed=plan.seed)
        return pet


@contextmanager
def _empty(out: Path) -> Iterator[None]:
    """Lock a folder that holds nothing yet."""
    with locked_folder(out):
        if any(path.name != LOCK_FILE for path in out.iterdir()):
            raise ConfigError(f"the folder {str(out)!r} is not empty: name another with --out.")
        yield
