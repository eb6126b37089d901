"""Write the folder of a run as it happens, every file whole or absent."""

from __future__ import annotations

import functools
import importlib.metadata
import io
import json
import math
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tomli_w

from fedpet.config import Experiment
from fedpet.errors import ConfigError
from fedpet.export.model_card import write_adapter_card, write_card
from fedpet.export.peft_adapter import write_adapter
from fedpet.export.plain_model import no_room, write_model
from fedpet.run.generations import FILE
from fedpet.utils.atomic_write import atomic_write, whole_folder
from fedpet.utils.lock import locked_folder, make_folder
from fedpet.utils.paths import expand
from fedpet.utils.processor import processor_type

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fedpet.data import ClassCount
    from fedpet.pet.model import PetModel
    from fedpet.pet.structure import Structure
    from fedpet.protocol.plan import Plan

PACKAGES = ("fedpet", "flwr", "torch", "transformers", "datasets", "numpy", "ray", "zstandard")


@dataclass(frozen=True)
class RunFolder:
    """A run's folder; `path` exists."""

    path: Path

    def write_inputs(self, experiment: Experiment, plan: Plan) -> None:
        """Leave what decides the run, before the first round."""
        text = tomli_w.dumps(experiment.to_tables())
        self._write("config.toml", text.encode())
        self._write("plan.bin", plan.to_bytes())

    def write_classes(self, classes: Sequence[ClassCount]) -> None:
        """Leave the classes in their order, with their rows: entry i is output i of the model."""
        content = json.dumps([asdict(one) for one in classes], indent=2)
        self._write("classes.json", (content + "\n").encode())

    def write_structure(self, structure: Structure) -> None:
        """Leave the structure that is trained."""
        self._write("structure.json", structure.to_json().encode())

    def write_outputs(self, values: np.ndarray, model: PreTrainedModel, tokenizer: Path) -> None:
        """Leave the communicated values and the plain model with its tokeniser."""
        array = io.BytesIO()
        np.save(array, values.astype("<f4"))
        try:
            self.path.joinpath("checkpoint").mkdir(exist_ok=True)
        except OSError as error:
            raise no_room(self.path / "checkpoint", error) from None
        self._write("checkpoint/values.npy", array.getvalue())
        write_model(model, tokenizer, self.path / "model")

    def write_card(self, experiment: Experiment, result: dict[str, Any]) -> None:
        """Leave the card of the plain model beside it."""
        write_card(self.path / "model", experiment, result)

    def write_adapter(self, pet: PetModel, experiment: Experiment, server_round: int) -> None:
        """Leave what is trained after a round as an adapter of peft, with its card."""
        source, folder = experiment.backbone.model, self.path / f"peft_{server_round}"
        try:
            with whole_folder(folder) as building:
                peft_type, notes = write_adapter(pet, building, source)
                write_adapter_card(
                    building, source, peft_type=peft_type, notes=notes, name=folder.name
                )
        except OSError as error:
            raise no_room(folder, error) from None

    def write_generations(self, entries: list[dict[str, str]]) -> None:
        """Leave what the model writes for a few prompts."""
        text = json.dumps(entries, indent=2, ensure_ascii=False)
        self._write(FILE, f"{text}\n".encode())

    def write_result(self, result: dict[str, Any]) -> None:
        """Leave `result.json`: the last file of a run. A number that is none, NaN, is null."""
        text = json.dumps(_strict(result), indent=2, allow_nan=False)
        self._write("result.json", f"{text}\n".encode())

    def _write(self, name: str, content: bytes) -> None:
        path = self.path / name
        try:
            atomic_write(path, content, durable=True)
        except OSError as error:
            raise no_room(path, error) from None


def _strict(value: Any) -> Any:
    """Return the same as JSON can hold it."""
    if isinstance(value, dict):
        return {key: _strict(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def locked_run_folder(experiment: Experiment) -> Iterator[RunFolder]:
    """Make the folder that `run.out` names, or the next free `runs/NAME-N`, and lock it.

    A folder that was made and stays empty, since the run did not start, goes again.

    Raises:
        ConfigError: The folder holds a run already, another process works in it, or it cannot be
            made.
    """
    if experiment.run.out:
        path = expand(experiment.run.out)
        with locked_folder(path):
            _refuse_run(path)
            yield RunFolder(path)
        return
    with ExitStack() as held:
        while True:
            path = _next_free(experiment.run.name)
            try:
                held.enter_context(locked_folder(path, new=True))
                break
            except FileExistsError:
                continue  # another process was faster
        yield RunFolder(path)


def new_run_folder(experiment: Experiment) -> RunFolder:
    """Make the same folder, for a run that no other process can meet: it is not locked.

    Raises:
        ConfigError: It holds a run already, or cannot be made.
    """
    out, name = experiment.run.out, experiment.run.name
    path = expand(out) if out else _next_free(name)
    _refuse_run(path)
    make_folder(path)
    return RunFolder(path)


def _next_free(name: str) -> Path:
    number = 1
    while (path := Path("runs") / f"{name}-{number}").exists():
        number += 1
    return path


def _refuse_run(path: Path) -> None:
    if (path / "config.toml").exists():
        raise ConfigError(f"the folder {str(path)!r} holds a run already: name another with --out.")


@functools.cache
def versions() -> dict[str, str]:
    """Versions of what ran."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


@functools.cache
def machine(device: str = "cpu") -> dict[str, Any]:
    """On what it ran: processor, cores, memory, system; the GPU where models lay on one."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    gpu = {}
    if device == "cuda":
        import torch

        gpu["gpu"] = torch.cuda.get_device_name()
    return {
        **gpu,
        "processor": processor_type(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }
