"""What a run leaves behind: one folder, written as it happens, every file whole or absent."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tomli_w

from fedpet.config import Experiment
from fedpet.errors import ConfigError, RunError
from fedpet.files import write_whole
from fedpet.lock import locked_folder, make_folder
from fedpet.paths import expand

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fedpet.plan import Plan
    from fedpet.structure import Structure

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
)
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

    def write_structure(self, structure: Structure) -> None:
        """Leave the structure that is trained."""
        self._write("structure.json", structure.to_json().encode())

    def write_outputs(self, values: np.ndarray, model: PreTrainedModel, tokenizer: Path) -> None:
        """Leave the communicated values and the plain model with its tokeniser."""
        folder = self.path / "checkpoint"
        try:
            folder.mkdir(exist_ok=True)
            np.save(folder / "values.npy", values.astype("<f4"))
            write_model(model, tokenizer, self.path / "model")
        except OSError as error:
            raise _no_room(folder.parent, error) from None

    def write_result(self, result: dict[str, Any]) -> None:
        """Leave `result.json`: the last file of a run."""
        self._write("result.json", (json.dumps(result, indent=2) + "\n").encode())

    def _write(self, name: str, content: bytes) -> None:
        try:
            write_whole(self.path / name, content, durable=True)
        except OSError as error:
            raise _no_room(self.path / name, error) from None


def _no_room(path: Path, error: OSError) -> RunError:
    return RunError(
        f"{str(path)!r} cannot be written: {error.strerror or error}. Make room; a run that was "
        "cut short goes on with `fedpet simulate --resume RUN`."
    )


def write_model(model: PreTrainedModel, tokenizer: Path, folder: Path) -> None:
    """Save a plain model as a Hugging Face folder, with the tokeniser's files beside it."""
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (tokenizer / name).exists():
            shutil.copyfile(tokenizer / name, folder / name)


@contextmanager
def claimed_run(experiment: Experiment) -> Iterator[RunFolder]:
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
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _processor() -> str:
    """Its type, on which alone the same seed gives the same bytes: a name covers several."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = told.get("model name", "") or platform.processor()
    numbers = [f"{key} {told[key]}" for key in ("cpu family", "model") if key in told]
    return f"{name} ({', '.join(numbers)})" if numbers else name
