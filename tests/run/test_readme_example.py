"""The example of the README's first screen, word for word, on the bundled model and reviews."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from datasets import DatasetDict
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import fedpet
from fedpet.config import Experiment
from fedpet.run.bundled_data import bundled_model, bundled_reviews

pytestmark = [
    pytest.mark.simulation,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not hasattr(fedpet.strategies, "FedAvg"), reason="strategies take keywords elsewhere"
    ),
]

EXAMPLE = """
import fedpet
from transformers import AutoModelForSequenceClassification

base = AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)
model = fedpet.get_pet_model(base, fedpet.PetConfig(
    mask=fedpet.MaskConfig(density=0.001),
    modules=[fedpet.LoraConfig(r=8, target_modules=["query", "value"]), fedpet.LayerNormConfig()]))
model.print_trainable_parameters()
run = fedpet.simulate(model, fedpet.load_federated_dataset(ds, client_column="film", tokenizer=tok),
                      strategy=fedpet.strategies.FedAvg(clients_per_round=10), num_rounds=20, callbacks=[...])
run.metrics, run.ledger.total_bytes; run.model.merge_and_unload().save_pretrained(folder)
"""  # noqa: E501 - as it stands in the README


def run_example(text: str, **names: Any) -> dict[str, Any]:
    """Run the example with `names` at hand."""
    callback = fedpet.Callback()
    text = text.replace("callbacks=[...]", "callbacks=[callback]")
    names["callback"] = callback
    exec(compile(textwrap.dedent(text), "README.md", "exec"), names)
    return names


def same_job_by_file(run: fedpet.Run, data: dict[str, Any], folder: Path) -> fedpet.Run:
    """The same job by an experiment file, over rows that `data.source` names."""
    tables = Experiment.from_file(run.folder / "config.toml").to_tables()
    tables["data"] |= data
    tables["run"] |= {"name": "by-file", "out": str(folder)}
    file = folder.with_suffix(".toml")
    file.write_text(tomli_w.dumps(tables), encoding="utf-8")
    return fedpet.simulate(file, progress=False)


def check(text: str, ds: DatasetDict, data: dict[str, Any], folder: Path) -> None:
    torch.manual_seed(1)
    name = bundled_model()
    tok = AutoTokenizer.from_pretrained(name)
    run = run_example(text, name=name, ds=ds, tok=tok, folder="out")["run"]
    saved = AutoModelForSequenceClassification.from_pretrained("out").state_dict()
    plain = AutoModelForSequenceClassification.from_pretrained(run.folder / "model").state_dict()
    assert all(torch.equal(saved[key], plain[key]) for key in plain)
    assert 0.3 < run.metrics["accuracy"] < 1
    data = {**data, "eval-split": "test", "train-split": "train"}
    other = same_job_by_file(run, data, folder)
    assert other.result["final_values_sha256"] == run.result["final_values_sha256"]


def test_the_example_equals_the_job_by_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = bundled_reviews()
    ds = DatasetDict({split: whole[split].select(range(300)) for split in ("train", "test")})
    (tmp_path / "rows").mkdir()
    for split in ds:
        ds[split].to_json(tmp_path / "rows" / f"{split}.jsonl")
    data = {"source": str(tmp_path / "rows"), "label-names": ["rotten", "fresh"]}
    text = EXAMPLE.replace("num_rounds=20", "num_rounds=2")
    check(text, ds, data, tmp_path / "by-file")
    assert "trainable params" in capsys.readouterr().out


@pytest.mark.slow
def test_the_example_word_for_word_equals_the_job_by_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = bundled_reviews()
    whole.pop("validation")
    (tmp_path / "rows").mkdir()
    for split in whole:
        whole[split].to_parquet(tmp_path / "rows" / f"{split}.parquet")
    data = {"source": str(tmp_path / "rows")}
    check(EXAMPLE, bundled_reviews(), data, tmp_path / "by-file")
