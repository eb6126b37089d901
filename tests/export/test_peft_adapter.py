"""Adapters that peft and transformers load: the outputs are those of the merged model, to 1e-5."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import architectures
import in_process_run
import pytest
import tiny
import torch
from safetensors.torch import load_file

import fedpet
from fedpet import (
    BitFitConfig,
    HiwiConfig,
    LayerNormConfig,
    LoraConfig,
    MaskConfig,
    PetConfig,
    PetModel,
)
from fedpet.errors import ConfigError
from fedpet.export import export_peft, export_run
from fedpet.export.peft_adapter import CONFIG_FILE, TENSORS_FILE

peft = pytest.importorskip("peft")

# What peft and transformers say of themselves, and of norms under LN_TUNING.
SAID = ("is_gradient_checkpointing", "Unsupported layer type", "fan_in_fan_out")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        for text in SAID:
            warnings.filterwarnings("ignore", message=f".*{text}")
        yield


def by_peft(base: Any, folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(base, folder).eval()


def by_peft_merged(base: Any, folder: Path) -> Any:
    return by_peft(base, folder).merge_and_unload()


def by_transformers(base: Any, folder: Path) -> Any:
    base.load_adapter(str(folder))
    return base.eval()


FFN = ["ffn-up", "ffn-down"]
LOADERS = [by_peft, by_peft_merged, by_transformers]


def largest_difference(model: Any, other: Any, inputs: dict[str, Any]) -> float:
    with torch.no_grad():
        return float((model(**inputs).logits - other(**inputs).logits).abs().max())


# Runs

RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LORA", {"mask_enabled": False, "structure_preset": "lnfit+ln-bias+lora"}),
    "factors-biases": ("LORA", {"mask_enabled": False, "structure_preset": "bitfit+lora-factors"}),
    "mask": ("SUPERTUNING", {"structure_preset": "lnfit"}),
    "mask-per-tensor": ("SUPERTUNING", {"mask_granularity": "per-tensor"}),
    "mask-lora": ("SUPERTUNING", {"structure_preset": "ln-bias+lora"}),
    "norms": ("LN_TUNING", {"mask_enabled": False, "structure_preset": "lnfit"}),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path, Path]]:
    """Checkpoint, adapter and plain model of a run, by its name."""
    folder = tmp_path_factory.mktemp("peft")
    backbone, rows = tiny.make_backbone(folder / "bert"), tiny.make_rows(folder / "rows")

    def find(name: str) -> tuple[Path, Path, Path]:
        adapter, plain = folder / f"{name}-adapter", folder / f"{name}-plain"
        if not adapter.exists():
            given = {"structure_preset": "lnfit", **RUNS[name][1]}
            experiment = tiny.make_experiment(
                backbone, rows, folder / name, strategy_num_rounds=1, **given
            )
            in_process_run.run(experiment)
            export_run(folder / name, adapter, "peft")
            export_run(folder / name, plain, "merged")
        return backbone, adapter, plain

    return find


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("name", RUNS)
def test_an_exported_run_answers_as_its_plain_model(
    exported: Callable[[str], tuple[Path, Path, Path]], name: str, load: Any
) -> None:
    from transformers import AutoModelForSequenceClassification as Auto

    backbone, adapter, plain = exported(name)
    inputs = architectures.batch("bert")
    inputs["input_ids"] %= 20
    base = Auto.from_pretrained(backbone, num_labels=2).eval()
    wanted = Auto.from_pretrained(plain).eval()
    assert largest_difference(base, wanted, inputs) > 1e-3
    assert json.loads((adapter / CONFIG_FILE).read_text())["peft_type"] == RUNS[name][0]
    assert largest_difference(load(base, adapter), wanted, inputs) < 1e-5


@pytest.mark.parametrize("name", ["lora", "mask"])
def test_an_adapter_finds_its_checkpoint_by_itself(
    exported: Callable[[str], tuple[Path, Path, Path]], name: str
) -> None:
    from transformers import AutoModelForSequenceClassification as Auto

    _, adapter, plain = exported(name)
    inputs = architectures.batch("bert")
    inputs["input_ids"] %= 20
    wanted = Auto.from_pretrained(plain).eval()
    for found in (
        peft.AutoPeftModelForSequenceClassification.from_pretrained(adapter),
        Auto.from_pretrained(adapter),
    ):
        assert largest_difference(found.eval(), wanted, inputs) < 1e-5


def test_a_mask_of_one_density_a_weight_is_filled_up_by_few_entries_and_a_global_one_by_more(
    exported: Callable[[str], tuple[Path, Path, Path]],
) -> None:
    zeros = {}
    for name in ("mask-per-tensor", "mask"):
        tensors = load_file(exported(name)[1] / TENSORS_FILE)
        values = [t for key, t in tensors.items() if key.endswith("supertuning_values")]
        zeros[name] = sum(int((value == 0).sum()) for value in values)
        for key, places in tensors.items():
            if key.endswith("supertuning_indices"):
                assert places.dtype == torch.int32
                assert len(places.unique()) == len(places)
    assert zeros["mask-per-tensor"] <= 13 < zeros["mask"]  # at most one a weight, by rounding
    card = (exported("mask")[1] / "README.md").read_text()
    assert re.search(r"so [\d,]+ entries that are\s+zero stand beside the 870", card)


# Models of one's own


def small(name: str, config: PetConfig) -> tuple[Any, PetModel]:
    """The model as it was, and adapted and trained by a few steps."""
    base = architectures.backbone(name).model
    pet = fedpet.get_pet_model(architectures.backbone(name).model, config)
    generator = torch.Generator().manual_seed(1)
    pet.set_delta(0.1 * torch.randn(pet.num_values, generator=generator))
    return base, pet


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(
    ("name", "config"),
    [
        (
            "roberta",
            PetConfig(modules=[LoraConfig(r=2), LoraConfig(r=3, target_modules=["ffn-up"])]),
        ),
        ("distilbert", PetConfig(mask=MaskConfig(density=0.02), modules=[LoraConfig(r=2)])),
        ("albert", PetConfig(mask=MaskConfig(density=0.02, rule="largest"))),
        ("deberta-v2", PetConfig(modules=[LoraConfig(r=2, freeze_a=False), BitFitConfig()])),
        ("t5", PetConfig(modules=[LoraConfig(r=2), LayerNormConfig(bias=False)])),
        ("gpt2", PetConfig(modules=[LoraConfig(r=2, lora_alpha=1), LayerNormConfig()])),
        ("llama", PetConfig(mask=MaskConfig(density=0.05), modules=[LoraConfig(r=1)])),
        ("bert", PetConfig(modules=[LoraConfig(r=2), HiwiConfig(on="weight"), HiwiConfig()])),
        ("bert", PetConfig(modules=[BitFitConfig(), HiwiConfig(), LayerNormConfig()])),
        ("vit", PetConfig(mask=MaskConfig(density=0.01, rule="random"))),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_exported_model_of_any_architecture_answers_as_the_adapted_one(
    name: str, config: PetConfig, load: Any, tmp_path: Path
) -> None:
    base, pet = small(name, config)
    inputs = architectures.batch(name)
    assert largest_difference(base, pet, inputs) > 1e-3
    export_peft(pet, tmp_path / "adapter")
    assert largest_difference(load(base, tmp_path / "adapter"), pet.eval(), inputs) < 1e-5


def test_exporting_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    _, pet = small("bert", PetConfig(mask=MaskConfig(density=0.02), modules=[LoraConfig(r=2)]))
    before = pet.get_delta()
    assert export_peft(pet, tmp_path / "adapter") == "SUPERTUNING"
    assert torch.equal(pet.get_delta(), before)


@pytest.mark.parametrize(
    ("name", "config", "reason"),
    [
        ("gpt2", PetConfig(modules=[HiwiConfig()]), "BEFT, .*'transformer.h.0.* is a Conv1D"),
        ("bert", PetConfig(modules=[fedpet.AdapterConfig(r=2)]), "adds to the model's own"),
        ("t5", PetConfig(modules=[BitFitConfig(target_modules=["query"])]), "adds to the model's"),
        (
            "bert",
            PetConfig(mask=MaskConfig(density=0.02), modules=[HiwiConfig()]),
            "has no place for the bias",
        ),
        ("gpt2", PetConfig(mask=MaskConfig(density=0.02)), "'transformer.h.0.* is a Conv1D"),
        ("bert", PetConfig(), "only the head trains"),
    ],
)
def test_what_peft_cannot_express_is_refused_with_the_reason_and_what_to_do(
    name: str, config: PetConfig, reason: str, tmp_path: Path
) -> None:
    _, pet = small(name, config)
    with pytest.raises(ConfigError, match=reason) as caught:
        export_peft(pet, tmp_path / "adapter")
    assert "--format merged" in str(caught.value)
    assert not (tmp_path / "adapter").exists()


def test_another_format_and_a_folder_that_holds_something_are_refused(
    exported: Callable[[str], tuple[Path, Path, Path]],
) -> None:
    _, adapter, _ = exported("mask")
    run = adapter.with_name("mask")
    with pytest.raises(ConfigError, match="one of merged, peft, got 'gguf'"):
        export_run(run, adapter.with_name("new"), "gguf")
    with pytest.raises(ConfigError, match="is not empty"):
        export_run(run, adapter, "peft")
    with pytest.raises(ConfigError, match="is no folder of a finished run"):
        export_run(adapter, adapter.with_name("new"), "peft")
