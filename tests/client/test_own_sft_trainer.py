"""TRL's `SFTTrainer` trains the clients, with all that it puts on its model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from in_process_run import run
from language_models import experiment_of, make_rows, save_model

pytest.importorskip("trl", reason="TRL is not installed")

SCRIPT = """
import datasets
import fedpet
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

model = AutoModelForCausalLM.from_pretrained({model!r}, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained({model!r})
arguments = SFTConfig(
    {out!r}, num_train_epochs=2, per_device_train_batch_size=64, lr_scheduler_type="constant",
    optim="sgd", report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, max_length=48,
    activation_checkpointing={checkpointing}, assistant_only_loss={own},
    dataloader_pin_memory=False,
)
if {own}:  # its own file and its own tokenising, by the client's name
    rows = datasets.load_dataset("json", data_files={rows!r}, split="train")
    rows = rows.filter(lambda row: row["client"] == fedpet.client_name())
    rows = rows.select_columns(["messages"])
else:
    rows = datasets.Dataset.from_list(fedpet.client_rows())
trainer = SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
fedpet.patch(trainer)
"""


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_an_sft_trainer_ends_in_the_values_of_our_loop(
    own: bool, checkpointing: bool, tmp_path: Path
) -> None:
    from language_models import MARKED

    model = save_model(tmp_path / "model", template=MARKED)
    rows = make_rows(tmp_path / "rows")
    script = tmp_path / "client.py"
    script.write_text(
        SCRIPT.format(
            model=str(model), out=str(tmp_path / "trainer"), checkpointing=checkpointing, own=own,
            rows=str(rows / "train.jsonl"),
        )
    )  # fmt: skip
    values, qualities = [], []
    for name, path in (("ours", ""), ("theirs", str(script))):
        experiment = experiment_of(
            model, rows, tmp_path / name, training_optimizer="sgd", training_batch_size=64,
            training_local_epochs=2, training_learning_rate=0.5, structure_preset="lnfit+lora",
            clients_script=path, data_max_length=48,
        )  # fmt: skip
        qualities.append(run(experiment)["quality"])
        values.append(np.load(tmp_path / name / "checkpoint" / "values.npy"))
    assert np.abs(values[0]).max() > 1e-3
    np.testing.assert_allclose(values[1], values[0], rtol=1e-3, atol=1e-6)
    assert qualities[1]["final"] == pytest.approx(qualities[0]["final"], rel=1e-5)
    assert qualities[1]["final"] < qualities[1]["before"]
