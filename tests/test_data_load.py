"""From a file to clients: what is loaded is what stands there, and the second time it is quick."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import fedpet.data.load as load_module
from fedpet.config import DataConfig, PopulationConfig
from fedpet.data import FederatedData, Rows, hash_tokenizer, load_data
from fedpet.data.load import _choose
from fedpet.errors import ConfigError, DataError

WORDS = [f"w{i}" for i in range(40)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
TWO_OR_MORE = PopulationConfig(partition="iid", num_clients=4, min_rows=2)


def save_tokenizer(folder: Path, words: list[str], **special: str) -> Path:
    """A tokeniser of whole words that marks pairs as BERT does."""
    vocabulary = {word: i for i, word in enumerate(SPECIAL + words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **special,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"), WORDS, pad_token="[PAD]")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def some_rows(n: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [
        {
            "text": " ".join(rng.choice(WORDS, size=rng.integers(1, 12))) + f" w{i % 40}",
            "other": " ".join(rng.choice(WORDS, size=rng.integers(1, 12))),
            "label": ["no", "yes"][i % 2],
            "score": float(i) / 4,
            "owner": f"owner {i % 5}",
        }
        for i in range(n)
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "set" / "train.jsonl", some_rows(40))
    write(tmp_path / "set" / "test.jsonl", some_rows(12, seed=1))
    return tmp_path / "set"


def texts_of(rows: Rows, tokenizer_folder: Path) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    return [
        tokenizer.decode(rows.tokens[a + 1 : b - 1])  # between [CLS] and [SEP]
        for a, b in zip(rows.offsets, rows.offsets[1:], strict=False)
    ]


# What is loaded.


@pytest.mark.parametrize("pair", [False, True])
def test_a_row_holds_exactly_what_the_tokeniser_makes_of_its_text(
    folder: Path, tokenizer_folder: Path, tmp_path: Path, pair: bool
) -> None:
    columns = ("text", "other") if pair else ("text",)
    data = DataConfig(source=str(folder), text_columns=columns, max_length=16)
    loaded = load_data(data, TWO_OR_MORE, tokenizer_folder, cache=tmp_path / "cache")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    for i, row in enumerate(some_rows(40)):
        expected = tokenizer(*(row[name] for name in columns), truncation=True, max_length=16)
        batch = loaded.train.batch(np.array([i]))
        assert batch["input_ids"][0].tolist() == expected["input_ids"]
        assert batch["token_type_ids"][0].tolist() == expected["token_type_ids"]
        assert batch["labels"].tolist() == [["no", "yes"].index(row["label"])]
    assert loaded.train.lengths.max() <= 16
    assert loaded.train.pad_id == 0
    assert loaded.task.label_names == ("no", "yes")
    assert (len(loaded.train), len(loaded.evaluation)) == (40, 12)


def test_a_regression_has_float_labels_and_no_label_names(
    folder: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    data = DataConfig(source=str(folder), label_column="score", task="regression", metric="pearson")
    loaded = load_data(data, TWO_OR_MORE, tokenizer_folder, cache=tmp_path / "cache")
    assert loaded.train.labels.dtype == np.float32
    assert loaded.train.labels.tolist() == [i / 4 for i in range(40)]
    assert (loaded.task.kind, loaded.task.num_outputs) == ("regression", 1)


def test_natural_clients_own_the_rows_that_name_them(
    folder: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    population = PopulationConfig(client_column="owner")
    data = DataConfig(source=str(folder))
    for _ in range(2):  # read, and from the cache
        loaded = load_data(data, population, tokenizer_folder, cache=tmp_path / "cache")
        assert {client.id: client.rows.tolist() for client in loaded.clients} == {
            f"owner {k}": list(range(k, 40, 5)) for k in range(5)
        }
        assert (loaded.left_out_clients, loaded.left_out_rows) == (0, 0)


def test_a_client_below_the_least_number_of_rows_is_left_out_and_counted(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    rows = [
        {**row, "owner": "large" if i < 27 else f"small {i % 2}"}
        for i, row in enumerate(some_rows(40))
    ]
    write(tmp_path / "set" / "train.jsonl", rows)
    loaded = load_data(
        DataConfig(source=str(tmp_path / "set"), eval_split="train"),
        PopulationConfig(client_column="owner", min_rows=8),
        tokenizer_folder,
        cache=tmp_path / "cache",
    )
    assert [client.id for client in loaded.clients] == ["large"]
    assert (loaded.left_out_clients, loaded.left_out_rows) == (2, 13)


def test_a_partitioner_from_outside_sees_all_columns_and_deals_out_the_rows(
    folder: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    class ByOwner:
        dataset: Any = None
        num_partitions = 5

        def load_partition(self, partition_id: int) -> Any:
            owners = np.array(self.dataset["owner"][:])
            return self.dataset.select(np.flatnonzero(owners == f"owner {partition_id}"))

    data = DataConfig(source=str(folder), max_train_rows=30)
    for _ in range(2):
        loaded = load_data(
            data, TWO_OR_MORE, tokenizer_folder, cache=tmp_path / "cache", partitioner=ByOwner()
        )
        natural = load_data(
            data,
            PopulationConfig(client_column="owner", min_rows=2),
            tokenizer_folder,
            cache=tmp_path / "cache",
        )
        assert [client.rows.tolist() for client in loaded.clients] == [
            client.rows.tolist() for client in natural.clients
        ]


@pytest.mark.parametrize(
    ("configured", "names", "labels"),
    [((), ("rotten", "fresh"), [1, 0, 1]), (("fresh", "rotten"), ("fresh", "rotten"), [0, 1, 0])],
)
def test_classes_that_the_source_names_keep_its_order_unless_another_is_configured(
    tokenizer_folder: Path,
    tmp_path: Path,
    configured: tuple[str, ...],
    names: tuple[str, ...],
    labels: list[int],
) -> None:
    rows = [{"text": "w1", "label": label} for label in (1, 0, 1)]
    classes = ClassLabel(names=["rotten", "fresh"])
    (tmp_path / "set").mkdir()
    dataset = Dataset.from_list(rows).cast_column("label", classes)
    dataset.to_parquet(str(tmp_path / "set" / "train.parquet"))
    loaded = load_data(
        DataConfig(source=str(tmp_path / "set"), eval_split="train", label_names=configured),
        PopulationConfig(partition="iid", num_clients=1, min_rows=1),
        tokenizer_folder,
        cache=tmp_path / "cache",
    )
    assert loaded.task.label_names == names
    assert loaded.train.labels.tolist() == labels


# Held-out rows, and limits.


@settings(deadline=None)
@given(
    texts=st.lists(st.text(max_size=4), min_size=1, max_size=60),
    fraction=st.floats(0.01, 0.99),
    max_rows=st.integers(0, 70),
)
def test_kept_and_held_out_rows_share_nothing_and_are_all(
    texts: list[str], fraction: float, max_rows: int
) -> None:
    kept, held = (_choose([texts], part, fraction, 0) for part in ("kept", "held out"))
    assert sorted([*kept, *held]) == list(range(len(texts)))
    assert not {texts[i] for i in kept} & {texts[i] for i in held}
    fewer = _choose([texts], "kept", fraction, max_rows)
    assert len(fewer) == (min(max_rows, len(kept)) if max_rows else len(kept))
    assert set(fewer) <= set(kept)
    assert (np.diff(fewer) > 0).all()


def test_the_held_out_fraction_is_about_the_one_asked_for() -> None:
    texts = [f"text {i}" for i in range(4000)]
    assert len(_choose([texts], "held out", 0.2, 0)) == pytest.approx(800, abs=80)


@pytest.mark.parametrize("one_file", [True, False])
def test_rows_are_held_out_of_one_file_or_where_no_evaluation_split_is_named(
    folder: Path, tokenizer_folder: Path, tmp_path: Path, one_file: bool
) -> None:
    data = (
        DataConfig(source=str(folder / "train.jsonl"))
        if one_file
        else DataConfig(source=str(folder), eval_split="")
    )
    loaded = load_data(data, TWO_OR_MORE, tokenizer_folder, cache=tmp_path / "cache")
    texts = [texts_of(rows, tokenizer_folder) for rows in (loaded.train, loaded.evaluation)]
    assert sorted(texts[0] + texts[1]) == sorted(row["text"] for row in some_rows(40))
    assert not set(texts[0]) & set(texts[1])


def test_limits_take_that_many_rows(folder: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    data = DataConfig(source=str(folder), max_train_rows=15, max_eval_rows=3)
    loaded = load_data(data, TWO_OR_MORE, tokenizer_folder, cache=tmp_path / "cache")
    assert (len(loaded.train), len(loaded.evaluation)) == (15, 3)
    assert max(client.rows.max() for client in loaded.clients) < 15


@pytest.mark.parametrize("eval_split", ["test", ""])
def test_training_rows_are_the_same_with_and_without_evaluation_rows(
    folder: Path, tokenizer_folder: Path, tmp_path: Path, eval_split: str
) -> None:
    data = DataConfig(source=str(folder), eval_split=eval_split)
    with_rows, without = (
        load_data(
            data, TWO_OR_MORE, tokenizer_folder, cache=tmp_path / str(wanted), evaluation=wanted
        )
        for wanted in (True, False)
    )
    np.testing.assert_array_equal(with_rows.train.tokens, without.train.tokens)
    assert len(with_rows.evaluation) > 0
    assert len(without.evaluation) == 0


def test_a_device_without_an_evaluation_split_can_load_its_training_rows(
    folder: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    (folder / "test.jsonl").unlink()
    data = DataConfig(source=str(folder))
    loaded = load_data(
        data, TWO_OR_MORE, tokenizer_folder, cache=tmp_path / "cache", evaluation=False
    )
    assert len(loaded.train) == 40
    with pytest.raises(DataError, match="has no split 'test'"):
        load_data(data, TWO_OR_MORE, tokenizer_folder, cache=tmp_path / "cache")


# The cache.


def same(one: FederatedData, other: FederatedData) -> bool:
    return (
        one.task == other.task
        and one.tokenizer_hash == other.tokenizer_hash
        and all(
            a.tokens.tobytes() == b.tokens.tobytes()
            and a.offsets.tobytes() == b.offsets.tobytes()
            and a.labels.tobytes() == b.labels.tobytes()
            for a, b in ((one.train, other.train), (one.evaluation, other.evaluation))
        )
        and [(c.id, c.rows.tolist()) for c in one.clients]
        == [(c.id, c.rows.tolist()) for c in other.clients]
    )


@settings(max_examples=8, deadline=None)  # each reads a file: a quarter of a second
@given(seed=st.integers(0, 10**6), num_rows=st.integers(4, 30))
def test_a_second_start_gives_the_same_bytes_and_tokenises_nothing(
    tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory, seed: int, num_rows: int
) -> None:
    home = tmp_path_factory.mktemp("set")
    write(home / "train.jsonl", some_rows(num_rows, seed))
    data = DataConfig(source=str(home), eval_split="train")
    population = PopulationConfig(partition="dirichlet", num_clients=2, min_rows=1, seed=seed)
    first = load_data(data, population, tokenizer_folder, cache=home / "cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load_module, "tokenise", None)  # not callable: a call would fail
        second = load_data(data, population, tokenizer_folder, cache=home / "cache")
    assert same(first, second)


def test_a_start_from_the_cache_imports_no_library_that_takes_seconds(
    folder: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    population = PopulationConfig(client_column="owner")
    load_data(DataConfig(source=str(folder)), population, tokenizer_folder, cache=cache)
    program = f"""
import sys
from pathlib import Path
from fedpet.config import DataConfig, PopulationConfig
from fedpet.data import load_data
data = DataConfig(source={str(folder)!r})
population = PopulationConfig(client_column="owner")
load_data(data, population, Path({str(tokenizer_folder)!r}), cache=Path({str(cache)!r}))
print(sorted({{"datasets", "pandas", "pyarrow", "transformers", "tokenizers"}} & set(sys.modules)))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_a_client_that_is_told_the_label_names_uses_what_the_server_stored(
    folder: Path, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataConfig(source=str(folder))
    server = load_data(data, TWO_OR_MORE, tokenizer_folder, cache=tmp_path / "cache")
    monkeypatch.setattr(load_module, "tokenise", None)
    told = replace(data, label_names=server.task.label_names)
    client = load_data(told, TWO_OR_MORE, tokenizer_folder, cache=tmp_path / "cache")
    assert same(server, client)


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 9},
        {"label_names": ("yes", "no")},
        {"text_columns": ("other",)},
        {"max_train_rows": 20},
        {"eval_split": ""},
        {"label_column": "score", "task": "regression", "metric": "pearson"},
    ],
)
def test_a_setting_that_changes_a_row_is_never_answered_from_the_old_rows(
    folder: Path, tokenizer_folder: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    data = DataConfig(source=str(folder))
    changed = replace(data, **change)
    load_data(data, TWO_OR_MORE, tokenizer_folder, cache=tmp_path / "cache")
    after = load_data(changed, TWO_OR_MORE, tokenizer_folder, cache=tmp_path / "cache")
    fresh = load_data(changed, TWO_OR_MORE, tokenizer_folder, cache=tmp_path / "other cache")
    assert same(after, fresh)


def test_an_edited_file_is_read_again(folder: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    data = DataConfig(source=str(folder))
    load_data(data, TWO_OR_MORE, tokenizer_folder, cache=tmp_path / "cache")
    write(folder / "train.jsonl", some_rows(30, seed=9))
    after = load_data(data, TWO_OR_MORE, tokenizer_folder, cache=tmp_path / "cache")
    assert texts_of(after.train, tokenizer_folder) == [r["text"] for r in some_rows(30, seed=9)]


def test_another_tokeniser_makes_other_rows_and_has_another_hash(
    folder: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    other = save_tokenizer(tmp_path / "other", WORDS[::-1], pad_token="[PAD]")
    data = DataConfig(source=str(folder))
    first, second = (
        load_data(data, TWO_OR_MORE, one, cache=tmp_path / "cache")
        for one in (tokenizer_folder, other)
    )
    assert first.tokenizer_hash == hash_tokenizer(tokenizer_folder)
    assert first.tokenizer_hash != second.tokenizer_hash
    assert first.train.tokens.tolist() != second.train.tokens.tolist()


def test_a_tokeniser_without_padding_fills_up_with_its_end_token(
    folder: Path, tmp_path: Path
) -> None:
    bare = save_tokenizer(tmp_path / "bare", WORDS, eos_token="[SEP]")
    loaded = load_data(DataConfig(source=str(folder)), TWO_OR_MORE, bare, cache=tmp_path / "cache")
    assert loaded.train.pad_id == 3


# What is refused.


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
    population = PopulationConfig(client_column="owner", min_rows=1)
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
            r"no column 'user'\. .*: set population\.client-column, or another population\.part",
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
