"""Build the wheel and install it beside this environment's other packages.

`python tests/helpers/installed_wheel.py FOLDER` leaves FOLDER/venv, whose `fedpet` is the wheel's.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def build_wheel(folder: Path) -> Path:
    """The wheel of the checkout, built without a network."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def install_wheel(wheel: Path, folder: Path) -> Path:
    """A new environment with the wheel in it; returns its `bin`.

    It sees the other packages of the environment that runs this, but not an editable fedpet: a
    folder that a `.pth` file names is searched, its own `.pth` files are not read.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    scheme = {"base": str(folder), "platbase": str(folder)}
    site = sysconfig.get_path("purelib", "venv", vars=scheme)
    outer = [entry for entry in sys.path if Path(entry).name == "site-packages"]
    Path(site, "outer.pth").write_text("\n".join(outer) + "\n")
    binaries = Path(sysconfig.get_path("scripts", "venv", vars=scheme))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    target = ["--python", str(binaries / "python"), "install", "--no-index", "--no-deps"]
    subprocess.run([*pip, *target, "--ignore-installed", str(wheel)], check=True)
    return binaries


if __name__ == "__main__":
    there = Path(sys.argv[1])
    install_wheel(build_wheel(there), there / "venv")
