"""Texts packed into blocks: every token once, in order, and no block of two clients."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from language_models import make_rows, save_tokenizer, sentence

from fedpet.config import ClientsConfig, DataConfig
from fedpet.data import FederatedData, Rows, count_clients, load_data
from fedpet.errors import ConfigError, DataError

END = 2
BY_COLUMN = ClientsConfig(client_column="client", min_rows=1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_rows(tmp_path_factory.mktemp("rows"))


def settings(source: Path, **changes: Any) -> DataConfig:
    return DataConfig(
        **{
            "source": str(source),
            "task": "language-modelling",
            "metric": "perplexity",
            "max_length": 16,
            **changes,
        }
    )


def texts_of(source: Path, split: str = "train") -> dict[str, list[str]]:
    """Return each client's texts in their order."""
    found: dict[str, list[str]] = {}
    for line in (source / f"{split}.jsonl").read_text().splitlines():
        row = json.loads(line)
        found.setdefault(row["client"], []).append(row["text"])
    return found


def stream(tokenizer: Path, texts: list[str], end: int | None = END) -> list[int]:
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(tokenizer)
    closing = [] if end is None else [end]
    return [token for text in texts for token in [*made(text)["input_ids"], *closing]]


def tokens_of(rows: Rows, indices: np.ndarray) -> list[list[int]]:
    return [rows.tokens[rows.offsets[i] : rows.offsets[i + 1]].tolist() for i in indices]


def load(source: Path, tokenizer: Path, tmp_path: Path, **changes: Any) -> FederatedData:
    return load_data(settings(source, **changes), BY_COLUMN, tokenizer, cache=tmp_path / "cache")


def test_a_client_s_blocks_are_its_texts_joined_by_the_end_token_and_cut(
    source: Path, tokenizer: Path, tmp_path: Path
) -> None:
    data = load(source, tokenizer, tmp_path)
    texts = texts_of(source)
    assert [client.id for client in data.clients] == sorted(texts)
    for client in data.clients:
        blocks = tokens_of(data.train, client.rows)
        assert [token for block in blocks for token in block] == stream(tokenizer, texts[client.id])
        assert {len(block) for block in blocks[:-1]} == {16}
        assert 2 <= len(blocks[-1]) <= 16
    assert sum(len(client.rows) for client in data.clients) == len(data.train)


def test_evaluation_blocks_hold_the_texts_of_one_client_each(
    source: Path, tokenizer: Path, tmp_path: Path
) -> None:
    held = load(source, tokenizer, tmp_path).evaluation
    assert held.clients is not None
    for number, texts in enumerate(dict(sorted(texts_of(source, "test").items())).values()):
        blocks = tokens_of(held, np.flatnonzero(held.clients == number))
        assert [token for block in blocks for token in block] == stream(tokenizer, texts)


def test_every_token_of_a_block_but_its_first_is_a_label(
    source: Path, tokenizer: Path, tmp_path: Path
) -> None:
    train = load(source, tokenizer, tmp_path).train
    assert train.labels.tolist() == (train.lengths - 1).tolist()
    batch = train.batch(np.arange(len(train)))
    inside = batch["attention_mask"].bool()
    assert (batch["labels"][:, 0] == -100).all()
    assert (batch["labels"][:, 1:][inside[:, 1:]] == batch["input_ids"][:, 1:][inside[:, 1:]]).all()
    assert (batch["labels"][~inside] == -100).all()


def test_a_last_block_of_one_token_which_predicts_nothing_is_left_out(
    tokenizer: Path, tmp_path: Path
) -> None:
    rows = [{"text": "good " * 15 + "bad", "client": "a"}, {"text": "film " * 7, "client": "b"}]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load(tmp_path, tokenizer, tmp_path)
    assert data.train.lengths.tolist() == [16, 8]  # sixteen words and the end, seven and the end


def test_a_separator_of_one_s_own_stands_behind_each_text(
    source: Path, tokenizer: Path, tmp_path: Path
) -> None:
    data = load(source, tokenizer, tmp_path, separator="\n")
    texts = texts_of(source)
    for client in data.clients:
        found = [token for block in tokens_of(data.train, client.rows) for token in block]
        assert found == stream(tokenizer, [f"{text}\n" for text in texts[client.id]], None)


def test_without_a_column_of_clients_their_texts_are_packed_after_they_are_dealt_out(
    source: Path, tokenizer: Path, tmp_path: Path
) -> None:
    iid = ClientsConfig(partition="iid", num_clients=5, min_rows=1)
    data = load_data(settings(source), iid, tokenizer, cache=tmp_path)
    found = [t for c in data.clients for b in tokens_of(data.train, c.rows) for t in b]
    expected = [t for texts in texts_of(source).values() for t in stream(tokenizer, texts)]
    assert sorted(found) == sorted(expected)
    assert len(data.clients) == 5
    assert all(tokens_of(data.train, client.rows)[-1][-1] == END for client in data.clients)


def test_a_second_start_reads_the_blocks_it_left(
    source: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedpet.tasks.language_modelling import LanguageModelling

    first = load(source, tokenizer, tmp_path)
    monkeypatch.setattr(LanguageModelling, "arrange", None)
    monkeypatch.setattr(LanguageModelling, "encode", None)
    again = load(source, tokenizer, tmp_path)
    assert np.array_equal(first.train.tokens, again.train.tokens)
    with pytest.raises(TypeError):
        load(source, tokenizer, tmp_path, max_length=17)


def test_a_client_with_too_few_blocks_takes_no_part_and_its_texts_are_counted(
    source: Path, tokenizer: Path, tmp_path: Path
) -> None:
    some = replace(BY_COLUMN, min_rows=5)
    data = load_data(settings(source), some, tokenizer, cache=tmp_path)
    sizes = {name: len(stream(tokenizer, texts)) for name, texts in texts_of(source).items()}
    few = [name for name, size in sizes.items() if -(-size // 16) < 5]
    assert 0 < len(few) < len(sizes)
    assert data.left_out_clients == len(few)
    books = data.books["train"]
    assert books.left_out == {"of clients below clients.min-rows": 8 * len(few)}
    assert books.used + 8 * len(few) == books.read


def test_clients_are_counted_without_a_tokeniser_by_the_bytes_of_their_texts(
    source: Path, tmp_path: Path
) -> None:
    found = count_clients(settings(source), BY_COLUMN, cache=tmp_path)
    for client, texts in texts_of(source).items():
        assert found.num_rows[client] == -(-sum(len(t) // 4 + 1 for t in texts) // 16)


def test_two_columns_and_a_text_of_blanks_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must name one column for data\.task = 'language"):
        settings(tmp_path, text_columns=("text", "other"))
    rows = [{"text": "good film", "client": "a"}, {"text": "  ", "client": "a"}]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"row 2 of .* has an empty text"):
        load(tmp_path, tokenizer, tmp_path)


def test_longer_texts_than_a_block_lose_no_token(tokenizer: Path, tmp_path: Path) -> None:
    text = sentence(np.random.default_rng(0), 100)
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"text": text, "client": "a"}) + "\n")
    data = load(tmp_path, tokenizer, tmp_path)
    assert data.train.lengths.tolist() == [16] * 6 + [5]
