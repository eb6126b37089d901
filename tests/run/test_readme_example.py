"""The example of the README's first screen, word for word, on the bundled model and reviews."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedpet
from fedpet.config import Experiment
from fedpet.data.bundled_data import bundled_model, bundled_reviews

pytestmark = [
    pytest.mark.simulation,
    pytest.mark.timeout(600),
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


def same_job_by_file(run: fedpet.Run, folder: Path) -> fedpet.Run:
    """The same job by an experiment file, over the reviews as `data.source` names them."""
    tables = Experiment.from_file(run.folder / "config.toml").to_tables()
    tables["data"]["source"] = "embedded"
    tables["population"] |= {"partition": "column", "client-column": "client"}
    tables["run"] |= {"name": "by-file", "out": str(folder)}
    return fedpet.simulate(Experiment.from_tables(tables), progress=False)


@pytest.mark.parametrize(
    "rounds",
    [2, pytest.param(20, marks=pytest.mark.slow)],
)
def test_the_example_runs_and_equals_the_job_by_file(
    rounds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    name = bundled_model()
    text = EXAMPLE.replace("num_rounds=20", f"num_rounds={rounds}")
    names = run_example(
        text, name=name, ds=bundled_reviews(), tok=AutoTokenizer.from_pretrained(name), folder="out"
    )
    run = names["run"]
    assert "trainable params" in capsys.readouterr().out
    assert 0.3 < run.metrics["accuracy"] < 1
    assert run.history[-1]["round"] == rounds
    saved = AutoModelForSequenceClassification.from_pretrained("out").state_dict()
    plain = AutoModelForSequenceClassification.from_pretrained(run.folder / "model").state_dict()
    assert all(torch.equal(saved[key], plain[key]) for key in plain)
    other = same_job_by_file(run, tmp_path / "by-file")
    assert other.result["final_values_sha256"] == run.result["final_values_sha256"]
    values = [np.load(one.folder / "checkpoint" / "values.npy") for one in (run, other)]
    assert np.array_equal(*values)
