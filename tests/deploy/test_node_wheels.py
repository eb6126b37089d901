"""A node's packages are all there as wheels: for x86-64 and for 64-bit Arm, in the pinned versions.

Asks the package registry, so only where $FEDPET_ASK_REGISTRY is set.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from fedpet.config import Experiment
from fedpet.deploy import Deployment, NodeSpec, write_deployment
from fedpet.deploy.flower_app import constraints, dependencies

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not os.environ.get("FEDPET_ASK_REGISTRY"),
        reason="asks the package registry: set FEDPET_ASK_REGISTRY=1",
    ),
]

GLIBC = ("manylinux2014", "manylinux_2_17", "manylinux_2_24", "manylinux_2_27", "manylinux_2_28")


def resolve(
    wanted: list[str], machine: str, python: str, pins: Path, folder: Path, *options: str
) -> Any:
    """Return the wheels that pip would install on such a machine."""
    platforms = [f"--platform={glibc}_{machine}" for glibc in GLIBC]
    report = folder / "report.json"
    command = [
        *(sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"),
        *("--dry-run", "--ignore-installed", "--only-binary=:all:", *platforms, *options),
        *(f"--python-version={python}", "--target", str(folder / "target")),
        *("--report", str(report), "-c", str(pins), *wanted),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(report.read_text())["install"]


@pytest.mark.parametrize("python", ["3.11", "3.13"])
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_every_package_of_a_node_is_had_as_a_wheel(
    machine: str, python: str, tmp_path: Path
) -> None:
    node = NodeSpec("ward-1")
    deployment = Deployment(experiment=Experiment(), host="127.0.0.1", nodes=(node,))
    write_deployment(deployment, tmp_path / "deployment")
    pins = tmp_path / "deployment" / "server" / "app" / "constraints.txt"
    # torch by itself, and what its build for CPUs stands on: the usual one brings CUDA's libraries,
    # gigabytes that a device without a GPU does not want.
    torch = resolve(["torch"], machine, python, pins, tmp_path, "--no-deps")
    under = [
        text
        for text in torch[0]["metadata"]["requires_dist"]
        if not Requirement(text).name.startswith(("nvidia", "cuda", "triton"))
        and "extra ==" not in text
    ]
    others = [text for text in dependencies() if Requirement(text).name != "torch"]
    found = torch + resolve([*others, *under], machine, python, pins, tmp_path)
    names = {entry["metadata"]["name"].lower() for entry in found}
    assert {"torch", "flwr", "transformers", "numpy", "tokenizers", "grpcio"} <= names
    assert not {"ray", "datasets", "pyarrow", "pandas", "matplotlib", "constriction"} & names
    files = [entry["download_info"]["url"].rpartition("/")[2] for entry in found]
    assert all(file.endswith(("any.whl", f"{machine}.whl")) for file in files), files
    assert len(found) <= len(constraints()) + 10  # of other machines and Pythons
