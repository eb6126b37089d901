"""The head of a backbone: the checkpoint's, drawn anew or kept, as `backbone.head` says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import classifiers
import in_process_run
import pytest
import tiny
import torch

from fedpet.backbone.module_roles import maskable_weights
from fedpet.backbone.pretrained import Backbone, fingerprint, load_backbone, load_for_task
from fedpet.config import BackboneConfig
from fedpet.data import Task
from fedpet.errors import BackboneError, ConfigError, PlanError
from fedpet.protocol.plan import Plan
from fedpet.run.federate import prepare

HEAD = ("classifier.weight", "classifier.bias")
NEG_POS = Task("classification", ("neg", "pos"), "accuracy")


def load(folder: Path, head: str = "train", task: Task = NEG_POS) -> Backbone:
    return load_for_task(BackboneConfig(model=str(folder), head=head), task)


def rows_of_output(backbone: Backbone) -> list[list[float]]:
    return backbone.model.classifier.weight.tolist()


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_backbone(tmp_path_factory.mktemp("bare") / "bert")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes without names."""
    return classifiers.make_classifier(tmp_path_factory.mktemp("classifier") / "bert")


def test_a_head_that_fits_is_trained_from_where_the_checkpoint_left_it(classifier: Path) -> None:
    backbone = load(classifier)
    assert backbone.trained_head == HEAD
    assert rows_of_output(backbone) == classifiers.stored(classifier)["classifier.weight"].tolist()
    assert backbone.origin.head_loaded == HEAD
    assert not backbone.origin.drawn


def test_a_new_head_is_drawn_from_the_seed_whatever_the_checkpoint_has(
    classifier: Path, bare: Path
) -> None:
    assert rows_of_output(load(classifier, "new")) == rows_of_output(load(bare, "new"))
    other = load_for_task(BackboneConfig(model=str(classifier), head="new", head_seed=1), NEG_POS)
    assert rows_of_output(other) != rows_of_output(load(classifier, "new"))


def test_a_kept_head_is_the_checkpoints_and_trains_nothing(classifier: Path) -> None:
    backbone = load(classifier, "keep")
    assert backbone.head == HEAD
    assert backbone.trained_head == ()
    assert rows_of_output(backbone) == classifiers.stored(classifier)["classifier.weight"].tolist()


def test_of_a_bare_encoder_train_and_new_are_the_same(bare: Path) -> None:
    train, new = load(bare, "train"), load(bare, "new")
    assert train.head == new.head == HEAD
    assert train.fingerprint == new.fingerprint
    assert rows_of_output(train) == rows_of_output(new)


def test_a_bare_encoder_has_no_head_to_keep(bare: Path) -> None:
    with pytest.raises(BackboneError, match=r"classifier.*'train'"):
        load(bare, "keep")


def test_a_head_for_another_number_of_classes_is_drawn_anew(tmp_path: Path) -> None:
    folder = classifiers.make_classifier(tmp_path / "three", ("a", "b", "c"), outputs=3)
    assert load(folder).origin.drawn == HEAD
    with pytest.raises(BackboneError, match="none for 2 outputs"):
        load(folder, "keep")


@pytest.mark.parametrize("head", ["train", "keep"])
def test_classes_in_another_order_bring_their_rows_with_them(tmp_path: Path, head: str) -> None:
    folder = classifiers.make_classifier(tmp_path / "turned", ("Pos", "NEG"))
    backbone = load(folder, head)
    pos, neg = classifiers.stored(folder)["classifier.weight"].tolist()
    assert rows_of_output(backbone) == [neg, pos]
    pos, neg = classifiers.stored(folder)["classifier.bias"].tolist()
    assert backbone.model.classifier.bias.tolist() == [neg, pos]
    assert "order" in backbone.origin.classes
    assert backbone.model.config.id2label == {0: "neg", 1: "pos"}


def test_a_head_for_classes_of_other_names_is_drawn_anew_and_told(
    tmp_path: Path, bare: Path
) -> None:
    folder = classifiers.make_classifier(tmp_path / "other", ("POSITIVE", "NEGATIVE"))
    backbone = load(folder)
    assert rows_of_output(backbone) == rows_of_output(load(bare))
    assert any("POSITIVE" in line and "neg" in line for line in backbone.origin.lines())
    with pytest.raises(BackboneError, match="POSITIVE, NEGATIVE"):
        load(folder, "keep")


def test_numbers_for_names_leave_the_rows_as_they_are(tmp_path: Path) -> None:
    folder = classifiers.make_classifier(tmp_path / "named", ("NEGATIVE", "POSITIVE"))
    numbers = Task("classification", ("0", "1"), "accuracy")
    assert load(folder, "keep", numbers).origin.head_loaded == HEAD


def test_a_node_with_other_class_names_in_its_config_is_not_taken_for_the_servers(
    tmp_path: Path,
) -> None:
    ours = classifiers.make_classifier(tmp_path / "ours", ("neg", "pos"))
    theirs = classifiers.make_classifier(tmp_path / "theirs", ("pos", "neg"))
    assert load(ours).fingerprint != load(theirs).fingerprint


@pytest.mark.parametrize("head", ["train", "keep"])
def test_no_mask_reaches_into_the_head(tmp_path: Path, head: str) -> None:
    """DeBERTa's pooler lies beside its base model, and is of the head."""
    import architectures

    folder = tmp_path / "deberta"
    architectures.backbone("deberta-v2").model.save_pretrained(folder)
    backbone = load(folder, head)
    assert "pooler.dense.weight" in backbone.head
    assert not set(maskable_weights(backbone.model, backbone.head)) & set(backbone.head)


def test_a_dense_layer_of_a_masked_language_model_is_no_head(tmp_path: Path) -> None:
    """ModernBERT's has the name of the classifier's: a bare encoder it is all the same."""
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    config = ModernBertConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        cls_token_id=2,
        sep_token_id=3,
    )
    ModernBertForMaskedLM(config).save_pretrained(tmp_path)
    assert load(tmp_path).head == HEAD


def test_a_pooler_that_a_checkpoint_lacks_is_drawn_told_and_trained(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    folder = tiny.make_backbone(tmp_path / "bert")
    config = BertConfig.from_pretrained(folder)
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    backbone = load(folder)
    assert backbone.trained_head == ("bert.pooler.dense.weight", "bert.pooler.dense.bias", *HEAD)
    assert "bert.pooler.dense.weight" in backbone.origin.lines()[0]


# The encoder itself.


def test_layers_that_the_weights_lack_are_refused(tmp_path: Path) -> None:
    folder = classifiers.change_config(tiny.make_backbone(tmp_path / "b"), num_hidden_layers=4)
    with pytest.raises(BackboneError, match=r"lacks 32 of .*encoder\.layer\.2.*config\.json"):
        load(folder)


def test_layers_that_the_config_leaves_out_are_told(tmp_path: Path) -> None:
    folder = classifiers.change_config(tiny.make_backbone(tmp_path / "b"), num_hidden_layers=1)
    lines = load(folder).origin.lines()
    assert any("16 tensors" in line and "layer.1." in line for line in lines)


def test_names_that_all_miss_by_a_prefix_are_refused_with_what_they_are(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = tiny.make_backbone(tmp_path / "bert")
    tensors = {f"student.{name}": value for name, value in classifiers.stored(folder).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BackboneError, match=r"student\."):
        load(folder)


def test_an_embedding_of_another_size_is_refused_with_both(tmp_path: Path) -> None:
    folder = classifiers.change_config(tiny.make_backbone(tmp_path / "bert"), vocab_size=30)
    with pytest.raises(BackboneError, match=r"word_embeddings.*\(22, 32\).*\(30, 32\)"):
        load(folder)


# The plan.


def test_a_plan_says_nothing_of_a_head_that_is_trained(bare: Path, tmp_path: Path) -> None:
    rows = tiny.make_rows(tmp_path / "rows")
    plan = prepare(tiny.make_experiment(bare, rows, tmp_path / "out"), tiny.Silent()).plan
    assert b'"head"' not in _header(plan)
    assert b'"head"' in _header(replace(plan, head="new"))
    for head in ("train", "new", "keep"):
        changed = replace(plan, head=head)
        assert Plan.from_bytes(changed.to_bytes()) == changed
    with pytest.raises(PlanError, match=r"backbone\.head"):
        Plan.from_bytes(replace(plan, head="other").to_bytes())


def _header(plan: Plan) -> bytes:
    import zstandard

    data = plan.to_bytes()
    return zstandard.ZstdDecompressor().decompress(data[16:])


def test_another_word_for_the_head_is_refused() -> None:
    with pytest.raises(ConfigError, match="train, new, keep"):
        BackboneConfig(head="frozen")


@pytest.mark.parametrize("head", ["new", "keep"])
def test_a_node_follows_the_plan_and_not_its_own_settings(
    classifier: Path, tmp_path: Path, head: str
) -> None:
    from fedpet.client.node_config import NodeConfig
    from fedpet.run.federate import federate
    from fedpet.run.local_grid import LocalGrid
    from fedpet.run.run_folder import new_run_folder

    rows = tiny.make_rows(tmp_path / "rows")
    experiment = tiny.make_experiment(
        classifier, rows, tmp_path / "out", backbone_head=head, strategy_num_rounds=1
    )
    settings = NodeConfig.from_experiment(experiment)
    settings = replace(settings, backbone=replace(settings.backbone, head="train"))
    told = Told()
    result = federate(
        LocalGrid.of(settings, 1), prepare(experiment, told), new_run_folder(experiment), told
    )
    assert result["refused"] == []
    assert result["model"]["head_values"] == (66 if head == "new" else 0)
    assert result["model"]["head"] == head
    drawn = list(HEAD) if head == "new" else []
    assert json.loads(json.dumps(result["model"]["origin"]))["drawn"] == drawn
    assert any("tensors come from the checkpoint" in line for line in told.lines)
    after = classifiers.stored(tmp_path / "out" / "model")
    before = classifiers.stored(classifier)
    assert torch.equal(after["classifier.weight"], before["classifier.weight"]) == (head == "keep")


class Told(tiny.Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def on_stage(self, text: str) -> None:
        self.lines.append(text)


def test_a_head_of_the_opposite_task_learns_this_one(tmp_path: Path) -> None:
    """Two runs, the second from the first's plain model with the labels turned."""
    rows = tiny.make_rows(tmp_path / "rows", clients=4)
    first = tiny.make_experiment(
        tiny.make_backbone(tmp_path / "bert"), rows, tmp_path / "first", training_learning_rate=0.03
    )
    assert in_process_run.run(first)["quality"]["final"] > 0.8
    classifiers.name_rows(rows, {0: "1", 1: "0"})
    second = tiny.make_experiment(
        tmp_path / "first" / "model", rows, tmp_path / "second", training_learning_rate=0.03
    )
    quality = in_process_run.run(second)["quality"]
    assert quality["before"] < 0.2
    assert quality["final"] > 0.8


def test_the_fingerprint_of_a_bare_encoder_is_that_of_its_own_tensors(bare: Path) -> None:
    own = [(f"bert.{name}", tensor) for name, tensor in classifiers.stored(bare).items()]
    assert len(own) == classifiers.BERT_TENSORS
    assert load_backbone(BackboneConfig(model=str(bare)), num_outputs=2).fingerprint == (
        fingerprint(own)
    )


MASKED = ("bert", "roberta", "distilbert", "mpnet", "albert", "deberta-v2", "electra")


@pytest.mark.parametrize("name", [*MASKED, "gpt2", "llama", "t5"])
def test_a_checkpoint_of_a_language_model_is_a_whole_encoder(name: str, tmp_path: Path) -> None:
    """Tied embeddings, poolers it lacks and a head for words that is left out: none is a loss."""
    import architectures
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

    kinds = {
        "gpt2": AutoModelForCausalLM,
        "llama": AutoModelForCausalLM,
        "t5": AutoModelForSeq2SeqLM,
    }
    config = architectures.backbone(name).model.config
    kinds.get(name, AutoModelForMaskedLM).from_config(config).save_pretrained(tmp_path)
    backbone = load(tmp_path)
    base = f"{backbone.model.base_model_prefix}."
    drawn = [part for part in backbone.origin.drawn if "pooler" not in part]
    assert backbone.head == backbone.origin.drawn
    assert drawn
    assert not any(part.startswith(base) for part in drawn)


def test_an_encoder_without_its_decoder_is_refused(tmp_path: Path) -> None:
    import architectures
    from transformers import T5EncoderModel

    T5EncoderModel(architectures.backbone("t5").model.config).save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="decoder"):
        load(tmp_path)


def test_a_kept_head_with_nothing_else_to_train_is_refused(
    classifier: Path, tmp_path: Path
) -> None:
    experiment = tiny.make_experiment(
        classifier,
        tiny.make_rows(tmp_path / "rows"),
        tmp_path / "out",
        backbone_head="keep",
        mask_enabled=False,
        structure_preset="none",
    )
    with pytest.raises(ConfigError, match="nothing is trained"):
        prepare(experiment, tiny.Silent())
