"""Give tests of loading a tokeniser of a few words, and a folder of two splits."""

from __future__ import annotations

from pathlib import Path

import pytest
from text_fixtures import WORDS, save_tokenizer, two_splits


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"), WORDS, pad_token="[PAD]")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return two_splits(tmp_path / "set")
