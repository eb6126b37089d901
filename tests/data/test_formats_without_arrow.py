"""Formats on a node, where pyarrow is not installed: each test of the formats holds there too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from test_data_formats import *  # noqa: F403 - the same tests once more


@pytest.fixture(scope="module", autouse=True)
def without_arrow() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in ("column", "text_encoder"):
            patch.setattr(f"fedpet.data.{module}.has_arrow", lambda: False)
        yield
