"""Data that cannot be used: refused by row, column or setting, in one sentence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from text_fixtures import TWO_OR_MORE, some_rows, write

from fedpet.config import ClientsConfig, DataConfig
from fedpet.data import load_data
from fedpet.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"text": None}, r"^row 4 of split 'train' of the folder '.*' has None in column 'text'"),
        ({"text": " \n"}, r"^row 4 of split 'train' .* has an empty text in column 'text'"),
        ({"label": None}, r"^row 4 of split 'train' .* has the label None\. Known are 'no', 'yes'"),
        ({"owner": None}, r"^row 4 of split 'train' .* names no client in column 'owner'"),
        ({"owner": " "}, r"^row 4 of split 'train' .* names no client in column 'owner'"),
    ],
)
def test_a_row_with_something_missing_is_refused_by_its_number(
    tokenizer_folder: Path, tmp_path: Path, bad: dict[str, Any], message: str
) -> None:
    rows = some_rows(10)
    rows[3] |= bad
    write(tmp_path / "set" / "train.jsonl", rows)
    data = DataConfig(source=str(tmp_path / "set"), eval_split="train")
    population = ClientsConfig(client_column="owner", min_rows=1)
    with pytest.raises(DataError, match=message):
        load_data(data, population, tokenizer_folder, cache=tmp_path / "cache")


def test_a_column_of_numbers_is_no_text(
    tokenizer_folder: Path, tmp_path: Path, folder: Path
) -> None:
    data = DataConfig(source=str(folder), text_columns=("score",))
    with pytest.raises(DataError, match=r"^row 1 .* has 0\.0 in column 'score', where a text"):
        load_data(data, TWO_OR_MORE, tokenizer_folder, cache=tmp_path / "cache")


def test_a_label_that_only_the_evaluation_rows_have_is_refused(
    folder: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    write(folder / "test.jsonl", [{"text": "w1", "label": "maybe"}])
    with pytest.raises(
        DataError, match=r"^row 1 of split 'test' .* has the label 'maybe'\. Known are 'no', 'yes'"
    ):
        load_data(
            DataConfig(source=str(folder)), TWO_OR_MORE, tokenizer_folder, cache=tmp_path / "cache"
        )


@pytest.mark.parametrize(
    ("change", "population", "message"),
    [
        ({"text_columns": ("body",)}, {}, r"no column 'body'\. .*'text'.*: set data\.text-columns"),
        ({"label_column": "class"}, {}, r"no column 'class'\. .*: set data\.label-column\.$"),
        (
            {},
            {"partition": "column", "client_column": "user"},
            r"no column 'user'\. .*: set clients\.client-column, or another clients\.part",
        ),
        ({"eval_split": "dev"}, {}, r"has no split 'dev'\. It has 'test', 'train': set data\.tr"),
        ({"train_split": "tain"}, {}, r"has no split 'tain'\. It has 'test', 'train': set data\."),
    ],
)
def test_a_name_that_is_not_in_the_data_is_refused_with_the_setting_and_the_known_ones(
    folder: Path,
    tokenizer_folder: Path,
    tmp_path: Path,
    change: dict[str, Any],
    population: dict[str, Any],
    message: str,
) -> None:
    data = replace(DataConfig(source=str(folder)), **change)
    with pytest.raises(DataError, match=message):
        load_data(
            data,
            replace(TWO_OR_MORE, **population),
            tokenizer_folder,
            cache=tmp_path / "cache",
        )


def test_more_tokens_than_the_backbone_takes_are_refused_with_its_limit(
    folder: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    data = DataConfig(source=str(folder), max_length=65)
    with pytest.raises(
        ConfigError, match=r"^data\.max-length is 65 tokens, and this backbone takes at most 64\.$"
    ):
        load_data(data, TWO_OR_MORE, tokenizer_folder, cache=tmp_path / "cache")


@pytest.mark.parametrize(("fraction", "part"), [(1e-12, "held out"), (1 - 1e-12, "kept")])
def test_a_fraction_that_leaves_one_side_empty_is_refused(
    folder: Path, tokenizer_folder: Path, tmp_path: Path, fraction: float, part: str
) -> None:
    data = DataConfig(source=str(folder), eval_split="", eval_fraction=fraction)
    with pytest.raises(DataError, match=rf"^no row of the 40 in split 'train' .* is {part} at"):
        load_data(data, TWO_OR_MORE, tokenizer_folder, cache=tmp_path / "cache")


@pytest.mark.parametrize(
    ("name", "content"), [("train.csv", "text,label\n"), ("train.jsonl", ""), ("train.json", "[]")]
)
def test_a_split_without_rows_is_refused(
    tokenizer_folder: Path, tmp_path: Path, name: str, content: str
) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / name).write_text(content)
    with pytest.raises(DataError, match="has no rows"):
        load_data(
            DataConfig(source=str(tmp_path / "set"), eval_split="train"),
            TWO_OR_MORE,
            tokenizer_folder,
            cache=tmp_path / "cache",
        )


def test_a_folder_without_a_tokeniser_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no tokeniser: neither tokenizer\.json nor vocab"):
        load_data(DataConfig(source=str(folder)), TWO_OR_MORE, tmp_path, cache=tmp_path / "cache")


def test_a_tokeniser_that_cannot_be_loaded_is_refused_in_one_line(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"^the tokeniser in '.*broken' cannot be loaded: .+$"):
        load_data(
            DataConfig(source=str(folder)),
            TWO_OR_MORE,
            tmp_path / "broken",
            cache=tmp_path / "cache",
        )
