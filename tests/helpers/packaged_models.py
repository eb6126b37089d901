"""Load models with real weights out of packages; tests skip where a package is not installed."""

from __future__ import annotations

import importlib.metadata

import pytest

from fedpet.backbone.pretrained import Backbone, load_for_task
from fedpet.config import BackboneConfig
from fedpet.data import Task


def packaged(package: str, task: Task) -> Backbone:
    """Load a package's weights, or skip."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed: see requirements-media.txt")
    return load_for_task(BackboneConfig(model=f"package:{package}"), task)
