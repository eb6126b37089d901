"""A user's own script trains the clients: its Trainer's loop, our values."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from in_process_run import run
from language_models import experiment_of, make_rows, save_model

import fedpet
from fedpet.config import Experiment
from fedpet.errors import ConfigError, RunError

pytest.importorskip("accelerate")

Make = Callable[..., Experiment]
ARGUMENTS = {
    "output_dir": "OUT", "num_train_epochs": 2, "per_device_train_batch_size": 64,
    "lr_scheduler_type": "constant", "optim": "sgd", "report_to": "none", "use_cpu": True,
    "weight_decay": 0.0, "disable_tqdm": True, "dataloader_pin_memory": False,
}  # fmt: skip
CHAT = """
import fedpet
from transformers import (AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer,
                          TrainingArguments)

model = AutoModelForCausalLM.from_pretrained({model!r}, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained({model!r})
rows = fedpet.client_rows() if fedpet.client_name() else [{{"input_ids": [5, 6], "labels": [5, 6]}}]
collator = DataCollatorForSeq2Seq(tokenizer)
trainer = Trainer(model=model, args=TrainingArguments(**{arguments!r}), train_dataset=rows,
                  data_collator=collator)
{before}
fedpet.patch(trainer{options})
print("beyond the line")
"""
CLASSES = """
import fedpet
from transformers import (AutoModelForSequenceClassification, AutoTokenizer,
                          DataCollatorWithPadding, Trainer, TrainingArguments)

model = AutoModelForSequenceClassification.from_pretrained({model!r}, num_labels=2)
tokenizer = AutoTokenizer.from_pretrained({model!r})
for module in model.modules():  # as fedpet's loop, which leaves dropout out
    if type(module).__name__ == "Dropout":
        module.p = 0.0
collator = DataCollatorWithPadding(tokenizer)
trainer = Trainer(model=model, args=TrainingArguments(**{arguments!r}),
                  train_dataset=fedpet.client_rows(), data_collator=collator)
fedpet.patch(trainer)
"""


def script(
    folder: Path, model: Path, text: str = CHAT, *, options: str = "", before: str = "", **more: Any
) -> str:
    arguments = ARGUMENTS | {"output_dir": str(folder / "trainer")} | more
    path = folder / "client.py"
    path.write_text(
        text.format(model=str(model), arguments=arguments, options=options, before=before)
    )
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("files")
    return save_model(folder / "model"), make_rows(folder / "rows")


@pytest.fixture
def chat(files: tuple[Path, Path], tmp_path: Path) -> Make:
    def make(**changes: Any) -> Experiment:
        settings = {
            "training_optimizer": "sgd", "training_batch_size": 64, "training_local_epochs": 2,
            "training_learning_rate": 0.5, "structure_preset": "lnfit+lora",
        } | changes  # fmt: skip
        out = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        return experiment_of(*files, out, **settings)

    return make


def values_of(experiment: Experiment) -> np.ndarray:
    values: np.ndarray = np.load(Path(experiment.run.out) / "checkpoint" / "values.npy")
    return values


def refusals_of(experiment: Experiment) -> set[str]:
    lines = (Path(experiment.run.out) / "rounds.jsonl").read_text().splitlines()
    return {entry["reason"] for line in lines for entry in json.loads(line)["refused"]}


def test_a_script_s_trainer_ends_in_the_values_of_our_loop(
    chat: Make, files: tuple[Path, Path], tmp_path: Path
) -> None:
    ours, theirs = chat(), chat(clients_script=script(tmp_path, files[0]))
    results = [run(ours), run(theirs)]
    assert np.abs(values_of(ours)).max() > 1e-3
    np.testing.assert_allclose(values_of(theirs), values_of(ours), rtol=1e-3, atol=1e-6)
    one, other = (result["quality"]["by_round"] for result in results)
    assert [p["value"] for p in other] == pytest.approx([p["value"] for p in one], rel=1e-5)
    books = [result["communication"] for result in results]
    assert books[1]["plan_bytes"] == books[0]["plan_bytes"]
    assert books[1]["messages"] == books[0]["messages"]


def test_a_classifier_s_head_is_the_federation_s_though_each_script_draws_its_own(
    tmp_path: Path,
) -> None:
    rows = tiny.make_rows(tmp_path / "rows", clients=3, rows_per_client=8)
    backbone = tiny.make_backbone(tmp_path / "backbone")
    found = []
    for name, path in (("ours", ""), ("theirs", script(tmp_path, backbone, CLASSES))):
        experiment = tiny.make_experiment(
            backbone, rows, tmp_path / name, training_optimizer="sgd", training_batch_size=64,
            training_local_epochs=2, training_learning_rate=0.5, clients_script=path,
        )  # fmt: skip
        run(experiment)
        found.append(values_of(experiment))
    assert np.abs(found[0]).max() > 1e-3
    np.testing.assert_allclose(found[1], found[0], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [{}, pytest.param({"structure_preset": "lora-factors+lnfit"}, marks=pytest.mark.slow)],
)
def test_the_same_script_gives_the_same_values_on_any_number_of_nodes(
    changes: dict[str, Any], chat: Make, files: tuple[Path, Path], tmp_path: Path
) -> None:
    path = script(
        tmp_path, files[0], optim="adamw_torch_fused", max_steps=3, per_device_train_batch_size=2
    )
    hashes = set()
    for nodes in (1, 3):
        experiment = chat(clients_script=path, training_optimizer="adamw", **changes)
        hashes.add(run(experiment, nodes=nodes)["final_values_sha256"])
    assert len(hashes) == 1


@pytest.mark.slow
def test_a_script_may_keep_its_own_learning_rate(
    chat: Make, files: tuple[Path, Path], tmp_path: Path
) -> None:
    federation = chat(clients_script=script(tmp_path, files[0]), training_learning_rate=0.25)
    run(federation)
    own = script(tmp_path, files[0], options=", learning_rates='trainer'", learning_rate=0.25)
    theirs = chat(clients_script=own, training_learning_rate=7.0)
    run(theirs)
    np.testing.assert_allclose(values_of(theirs), values_of(federation), rtol=1e-4, atol=1e-7)


def test_outside_a_federation_the_line_does_nothing(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left = runpy.run_path(script(tmp_path, files[0]), run_name="__main__")
    assert capsys.readouterr().out == "beyond the line\n"
    assert left["trainer"].model is left["model"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"before": "model.lm_head.weight.data += 1"}, "one with other weights in"),
        (
            {"before": "1 / 0"},
            "'client.py' failed for a client, in line 12, with ZeroDivisionError",
        ),
        ({"before": "raise SystemExit"}, "failed for a client, in line 12, with SystemExit"),
        ({"before": "trainer = model"}, "takes a transformers.Trainer, got LlamaForCausalLM"),
        ({"options": ", learning_rates='mine'"}, "learning_rates is one of federation, trainer"),
        ({"before": "trainer.create_optimizer()"}, "was given an optimiser or a schedule"),
        ({"before": "model.peft_config = {{}}"}, "is adapted by peft: leave peft_config out"),
        ({"text": "import fedpet"}, r"ended without fedpet.patch\(trainer\)"),
        ({"text": "import fedpet\n\n1 + + = 2"}, "in line 3, with SyntaxError"),
        ({"text": ""}, r"ended without fedpet.patch\(trainer\)"),
    ],
)
def test_a_script_that_cannot_train_is_refused_before_the_run_begins(
    change: dict[str, str], sentence: str, chat: Make, files: tuple[Path, Path], tmp_path: Path
) -> None:
    change = {key: value.replace("{{", "{").replace("}}", "}") for key, value in change.items()}
    experiment = chat(clients_script=script(tmp_path, files[0], **change))
    with pytest.raises(ConfigError, match=sentence):
        fedpet.simulate(experiment, backend="in-process", progress=False)
    assert not Path(experiment.run.out).exists()


def test_a_file_that_is_not_there_is_refused(chat: Make, tmp_path: Path) -> None:
    experiment = chat(clients_script=str(tmp_path / "absent.py"))
    with pytest.raises(ConfigError, match=r"there is no script .*absent\.py"):
        fedpet.simulate(experiment, backend="in-process", progress=False)


@pytest.mark.parametrize(
    "changes",
    [
        {"training_loss": "language_functions:whole_loss"},
        {"training_proximal_mu": 0.1, "strategy_name": "fedprox"},
    ],
)
def test_what_a_trainer_s_own_loop_does_not_do_is_refused(
    changes: dict[str, Any], chat: Make, files: tuple[Path, Path], tmp_path: Path
) -> None:
    experiment = chat(clients_script=script(tmp_path, files[0]), **changes)
    with pytest.raises(ConfigError, match="whose loss is its own: leave the key out"):
        run(experiment)


def test_clients_measure_with_a_script_s_values_and_a_model_that_diverged_is_refused(
    chat: Make, files: tuple[Path, Path], tmp_path: Path
) -> None:
    path = script(tmp_path, files[0])
    result = run(chat(clients_script=path, clients_eval_fraction=0.3))
    before, after = (result["quality"]["on_clients"][name] for name in ("before", "after"))
    assert after[-1]["row_mean"] < before[0]["row_mean"]
    broken = chat(clients_script=path, training_learning_rate=1e38)
    with pytest.raises(RunError):
        run(broken)
    assert any("NaN" in reason for reason in refusals_of(broken))


def test_a_server_cannot_name_a_script_of_a_node() -> None:
    from fedpet.client.node_config import NodeConfig

    experiment = Experiment.from_tables({"clients": {"script": "/tmp/theirs.py"}})
    for given in ({}, {"data": "rows.jsonl", "client": "ward-1"}):
        assert NodeConfig.from_experiment(experiment, given).script is None
    with pytest.raises(ConfigError, match="unknown key in --node-config: 'script'"):
        NodeConfig.from_experiment(experiment, {"script": "theirs.py"})
