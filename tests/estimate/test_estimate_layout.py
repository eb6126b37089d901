"""Test an outline of a model against the model, on every architecture."""

from __future__ import annotations

import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import architectures
import pytest
import tiny
import torch

from fedpet.backbone.module_roles import find_target_modules, maskable_weights
from fedpet.backbone.pretrained import Backbone, load_backbone
from fedpet.config import BackboneConfig, Experiment
from fedpet.errors import BackboneError, ConfigError, StructureError
from fedpet.estimate import count_values, outline
from fedpet.pet.mask import build_mask
from fedpet.pet.model import PetModel
from fedpet.pet.structure import PRESETS, load_structure
from fedpet.tasks import Task

# What a small random model of each architecture can carry, tried one by one below.
PRESET_NAMES = tuple(PRESETS)


def task_of(num_classes: int) -> Task:
    return Task("classification", tuple(map(str, range(num_classes))), "accuracy")


TASK = task_of(2)


def write_config(name: str, folder: Path) -> Path:
    """A config.json alone, as a user may hold one."""
    architectures._configs()[name]().save_pretrained(folder)
    return folder / "config.json"


def an_experiment(model: Path | str, **changes: Any) -> Experiment:
    tables: dict[str, dict[str, Any]] = {
        "backbone": {"model": str(model)},
        "mask": {"density": 0.1},
        "structure": {"preset": "none", "rank": 2},
    }
    for key, value in changes.items():
        stage, _, name = key.partition("_")
        tables.setdefault(stage, {})[name.replace("_", "-")] = value
    return Experiment.from_tables(tables)


def values_of_a_run(backbone: Backbone, experiment: Experiment) -> dict[str, int]:
    """Return the number of values that PetModel communicates, by kind."""
    structure = load_structure(
        experiment.structure, find_target_modules(backbone.model, backbone.head)
    )
    mask = None
    if experiment.mask.enabled:
        mask = build_mask(maskable_weights(backbone.model, backbone.head), experiment.mask)
    pet = PetModel(backbone, mask, structure, seed=0)
    counts: dict[str, int] = {}
    for segment in pet.segments:
        counts[segment.kind] = counts.get(segment.kind, 0) + segment.size
    return counts


@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
def test_an_outline_has_the_model_s_parameters_scope_and_head(name: str, tmp_path: Path) -> None:
    real = architectures.backbone(name)
    drawn = outline(BackboneConfig(model=str(write_config(name, tmp_path))), TASK)
    assert all(parameter.is_meta for parameter in drawn.model.parameters())
    assert type(drawn.model) is type(real.model)
    shapes = [(n, tuple(p.shape)) for n, p in real.model.named_parameters()]
    assert [(n, tuple(p.shape)) for n, p in drawn.model.named_parameters()] == shapes
    assert drawn.head == real.head
    assert find_target_modules(drawn.model, drawn.head) == find_target_modules(
        real.model, real.head
    )
    scope = {n: tuple(w.shape) for n, w in maskable_weights(real.model, real.head).items()}
    assert {
        n: tuple(w.shape) for n, w in maskable_weights(drawn.model, drawn.head).items()
    } == scope


@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
def test_every_preset_has_as_many_values_in_an_outline_as_in_a_model(
    name: str, tmp_path: Path
) -> None:
    file = write_config(name, tmp_path)
    compared = 0
    for preset in PRESET_NAMES:
        experiment = an_experiment(file, structure_preset=preset)
        drawn = outline(experiment.backbone, TASK)
        try:
            expected = values_of_a_run(architectures.backbone(name), experiment)
        except StructureError:  # this architecture has no place for it
            with pytest.raises(StructureError, match="finds nothing to act on"):
                count_values(drawn, experiment)
            continue
        assert count_values(drawn, experiment).values_by_kind == expected, preset
        compared += 1
    assert compared >= 4


@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
@pytest.mark.parametrize("granularity", ["global", "per-tensor"])
def test_a_mask_has_as_many_entries_in_an_outline_as_in_a_model(
    name: str, granularity: str, tmp_path: Path
) -> None:
    experiment = an_experiment(
        write_config(name, tmp_path), mask_granularity=granularity, mask_density=0.037
    )
    layout = count_values(outline(experiment.backbone, TASK), experiment)
    assert layout.values_by_kind == values_of_a_run(architectures.backbone(name), experiment)


def test_two_modules_on_one_bias_count_once(tmp_path: Path) -> None:
    file = write_config("bert", tmp_path)
    experiment = an_experiment(file, structure_preset="bitfit+hiwi-bias+lora")
    layout = count_values(outline(experiment.backbone, TASK), experiment)
    assert layout.values_by_kind == values_of_a_run(architectures.backbone("bert"), experiment)
    assert "hiwi-bias" not in layout.values_by_kind


def test_a_mask_that_is_off_counts_nothing(tmp_path: Path) -> None:
    file = write_config("bert", tmp_path)
    experiment = an_experiment(file, mask_enabled=False, structure_preset="lnfit")
    layout = count_values(outline(experiment.backbone, TASK), experiment)
    assert list(layout.values_by_kind) == ["lnfit", "head"]


def test_the_head_is_read_off_the_checkpoint_beside_the_configuration(tmp_path: Path) -> None:
    """As a loaded backbone's: also where a pooler is new, or the classifier is stored."""
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    config = BertConfig(
        vocab_size=22,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    stored = {
        "plain": tiny.make_backbone(tmp_path / "plain"),
        "no pooler": tmp_path / "no-pooler",
        "classifier": tmp_path / "classifier",
        "old": tmp_path / "old",
    }
    BertModel(config, add_pooling_layer=False).save_pretrained(stored["no pooler"])
    BertForSequenceClassification(config).save_pretrained(stored["classifier"])
    stored["old"].mkdir()
    config.save_pretrained(stored["old"])
    torch.save(BertModel(config).state_dict(), stored["old"] / "pytorch_model.bin")
    heads = {}
    for what, folder in stored.items():
        source = BackboneConfig(model=str(folder))
        for num_outputs in (2, 3):
            loaded = load_backbone(source, num_outputs=num_outputs)
            drawn = outline(source, task_of(num_outputs))
            assert drawn.head == loaded.head, (what, num_outputs)
            heads[what, num_outputs] = drawn.head
    assert heads["plain", 2] == ("classifier.weight", "classifier.bias")
    assert "bert.pooler.dense.weight" in heads["no pooler", 2]
    assert heads["classifier", 2] == heads["plain", 2]
    assert heads["classifier", 3] == ("classifier.weight", "classifier.bias")


def test_a_model_of_seven_billion_parameters_is_laid_out_without_memory_for_it(
    tmp_path: Path,
) -> None:
    from transformers import LlamaConfig

    LlamaConfig().save_pretrained(tmp_path)
    experiment = an_experiment(
        tmp_path / "config.json", structure_preset="lnfit+lora+hiwi-weight", structure_rank=8
    )
    tracemalloc.start()
    try:
        layout = count_values(outline(experiment.backbone, TASK), experiment)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert layout.pretrained_parameters + layout.head_parameters == 6_607_351_808
    assert sum(layout.scope) == 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert layout.values_by_kind["lora"] == 32 * 2 * 8 * 4096
    assert layout.lora_values == 32 * 2 * 8 * (4096 + 4096)
    assert peak < 100e6


def test_lora_beside_it_is_what_peft_trains(tmp_path: Path) -> None:
    """peft's own defaults for an architecture, rank 8, both factors."""
    from peft import LoraConfig, TaskType, get_peft_model

    for name in ("bert", "roberta", "t5", "gpt2", "llama"):
        model = architectures.backbone(name).model
        config = LoraConfig(task_type=TaskType.SEQ_CLS, r=8)
        with warnings.catch_warnings():  # of names in transformers, and of how Conv1D lies
            warnings.simplefilter("ignore")
            trained = get_peft_model(model, config)
        expected = sum(p.numel() for n, p in trained.named_parameters() if ".lora_" in n)
        experiment = an_experiment(write_config(name, tmp_path / name))
        layout = count_values(outline(experiment.backbone, TASK), experiment)
        assert layout.lora_values == expected, name


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("{", "Give a config.json"),
        ('{"model_type": "nonesuch"}', "nonesuch"),
        ("{}", "Give a config.json"),
        ('{"model_type": "bert", "hidden_size": 33}', "33"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(
    tmp_path: Path, content: str, wanted: str
) -> None:
    file = tmp_path / "config.json"
    file.write_text(content)
    with pytest.raises(BackboneError, match="is no configuration of a model") as refused:
        outline(BackboneConfig(model=str(file)), TASK)
    assert wanted in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_checkpoint_that_does_not_read_is_refused(tmp_path: Path) -> None:
    write_config("bert", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(BackboneError, match=r"does not read.*config.json alone is enough"):
        outline(BackboneConfig(model=str(tmp_path)), TASK)


@pytest.mark.parametrize("source", ["./absent", "absent.json", "/absent/config.json"])
def test_an_absent_configuration_is_refused(source: str) -> None:
    with pytest.raises(BackboneError, match=r"there is no .*absent"):
        outline(BackboneConfig(model=source), TASK)


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"holds no config\.json"):
        outline(BackboneConfig(model=str(tmp_path)), TASK)


def test_a_density_too_low_for_one_entry_is_refused_as_a_mask_would_be(tmp_path: Path) -> None:
    experiment = an_experiment(write_config("bert", tmp_path), mask_density=1e-6)
    with pytest.raises(ConfigError) as refused:
        count_values(outline(experiment.backbone, TASK), experiment)
    real = architectures.backbone("bert")
    with pytest.raises(ConfigError) as of_the_mask:
        build_mask(maskable_weights(real.model, real.head), experiment.mask)
    assert str(refused.value) == str(of_the_mask.value)
