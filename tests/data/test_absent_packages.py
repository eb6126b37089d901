"""Rows on a node, which has none of the packages that large data sets and plots need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from text_fixtures import WORDS, save_tokenizer

from fedpet.data.open_source import open_source
from fedpet.errors import ConfigError

ABSENT = ("datasets", "pandas", "pyarrow", "matplotlib", "ray")
BLOCK = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import importlib.util as util
found = util.find_spec
util.find_spec = lambda name, package=None: (
    None if name.split(".")[0] in {ABSENT!r} else found(name, package)
)
"""
DIGEST = """
import hashlib, json, shutil
from pathlib import Path
import numpy as np
from fedpet.config import ClientsConfig, DataConfig
from fedpet.data import load_data
for number, path in enumerate(argv[2:]):
    config = DataConfig(source=path, text_columns=("text", "other"), eval_split="")
    data = load_data(
        config, ClientsConfig(min_rows=1), Path(argv[1]), cache=Path(path).parent / str(number),
        evaluation=False,
    )
    rows = data.train
    found = hashlib.sha256()
    for part in (rows.tokens, rows.offsets, rows.labels):
        found.update(f"{part.dtype}{part.shape}".encode() + np.asarray(part).tobytes())
    clients = [(client.id, client.rows.tolist()) for client in data.clients]
    found.update(json.dumps([clients, list(data.task.label_names)]).encode())
    shutil.rmtree(Path(path).parent / str(number))
    print(found.hexdigest())
"""


ROWS = [
    {"text": "good film", "other": "a", "label": "pos", "client": "x"},
    {"text": 'bad\tplot, "dull"\nand grim', "other": " b ", "label": "neg", "client": "y"},
    {"text": "é naïve ☃ \U0001f600", "other": "not very good", "label": "pos", "client": "x"},
    {"text": "good film", "other": "A", "label": "neg", "client": "1"},
    {"text": "x" * 5000, "other": "the " * 400, "label": "pos", "client": "01"},
]


def test_a_process_without_the_packages_makes_the_same_examples_to_the_bit(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    import bz2
    import csv
    import gzip

    import zstandard

    tokenizer = save_tokenizer(tmp_path / "tokenizer", WORDS, pad_token="[PAD]")
    lines = "\n".join(json.dumps(row) for row in ROWS * 3) + "\n"
    files = {
        "a.jsonl": lines.encode(),
        "a.json": json.dumps(ROWS * 3).encode(),
        "a.jsonl.gz": gzip.compress(lines.encode()),
        "a.jsonl.bz2": bz2.compress(lines.encode()),
        "a.jsonl.zst": zstandard.compress(lines.encode()),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for name, separator in (("a.csv", ","), ("a.tsv", "\t")):
        with (tmp_path / name).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(ROWS[0]), delimiter=separator)
            writer.writeheader()
            writer.writerows(ROWS * 3)
    paths = [str(tmp_path / name) for name in (*files, "a.csv", "a.tsv")]
    command = [
        sys.executable,
        "-c",
        BLOCK + "from sys import argv\n" + DIGEST,
        str(tokenizer),
        *paths,
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr
    said: list[str] = []
    exec(
        DIGEST,
        {"print": said.append, "argv": ["", str(tokenizer), *paths]},
    )
    assert done.stdout.split() == said
    assert len(said) == len(paths)
    assert len(set(said)) == 1


def test_what_needs_a_package_that_is_not_there_says_which_extra_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedpet.utils.extras.find_spec", lambda name: None)
    pd.DataFrame(ROWS).to_parquet(tmp_path / "a.parquet")
    for source in (str(tmp_path / "a.parquet"), "owner/name"):
        with pytest.raises(ConfigError, match=r"is not installed: `pip install 'fedpet\[data\]'`"):
            open_source(source).read("train")
