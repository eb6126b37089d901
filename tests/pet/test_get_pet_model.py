"""`get_pet_model`: what of a user's own model trains, and how the model comes back."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, backbone, batch, loss_of

from fedpet import (
    AdapterConfig,
    BitFitConfig,
    CustomModuleConfig,
    HiwiConfig,
    LayerNormConfig,
    LoraConfig,
    PetConfig,
)
from fedpet.config import MaskConfig
from fedpet.errors import BackboneError, ConfigError, StructureError
from fedpet.pet.factory import get_pet_model
from fedpet.pet.model import PetModel
from fedpet.pet.structure import ModuleSpec, Structure

ALL = PetConfig(
    mask=MaskConfig(density=0.02),
    modules=[LoraConfig(r=2), LayerNormConfig(), HiwiConfig(r=2), BitFitConfig()],
)


def _base(name: str = "bert") -> Any:
    return backbone(name).model


def _targets(config: Any, name: str = "bert") -> list[str]:
    pet = get_pet_model(_base(name), PetConfig(modules=[config], modules_to_save=[]))
    return [segment.name for segment in pet.segments]


def test_only_the_trainables_are_shown_to_an_optimiser() -> None:
    pet = get_pet_model(_base(), ALL)
    shown = dict(pet.named_parameters())
    kinds = ["mask", "lora", "lnfit", "ln-bias", "hiwi-bias", "bitfit", "head"]
    assert list(shown) == [f"trainable.{kind}" for kind in kinds]
    assert all(parameter.requires_grad for parameter in shown.values())
    assert set(pet.state_dict()) == {*shown, "_extra_state"}


def test_the_call_the_signature_and_the_attributes_are_the_models() -> None:
    base = _base()
    signature = inspect.signature(base.forward)
    pet = get_pet_model(base, ALL)
    assert pet.training == base.training is False
    assert inspect.signature(pet.forward) == signature
    assert pet.config is base.config
    assert pet.device == base.device
    assert pet(**batch("bert"), labels=torch.tensor([0, 1, 1])).loss > 0
    assert pet.train().training
    assert base.training
    assert not pet.eval().model.training
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = pet.nonsense


def test_a_causal_model_generates_with_its_trainables() -> None:
    import transformers as t

    torch.manual_seed(0)
    base = t.GPT2LMHeadModel(t.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=60))
    pet = get_pet_model(base.eval(), PetConfig(modules=[LoraConfig(r=4)]))
    assert list(pet.trainable) == ["lora"]  # its head is pretrained, and tied
    ids = torch.randint(5, 60, (1, 4))
    plain = pet.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    pet.trainable["lora"].data.normal_(0, 3.0)  # as an optimiser that torch does not hear
    _ = pet.trainable["lora"].grad
    moved = pet.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    merged = pet.merge_and_unload()
    assert not torch.equal(plain, moved)
    assert torch.equal(
        merged.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0), moved
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_classifiers_head_trains_unless_it_is_told_otherwise(name: str) -> None:
    base = _base(name)
    prefix = base.base_model_prefix
    heads = [n for n, _ in base.named_parameters() if not n.startswith(f"{prefix}.")]
    pet = get_pet_model(base, PetConfig(modules=[LayerNormConfig()]))
    assert [s.name for s in pet.segments if s.kind == "head"] == heads
    pet.unload()
    pet = get_pet_model(base, PetConfig(modules=[LayerNormConfig()], modules_to_save=[]))
    assert "head" not in pet.trainable


def test_modules_to_save_are_found_by_path_or_its_end_and_are_no_targets() -> None:
    pet = get_pet_model(
        _base(),
        PetConfig(modules=[BitFitConfig()], modules_to_save=["classifier", "0.output.dense"]),
    )
    heads = [s.name for s in pet.segments if s.kind == "head"]
    assert heads == [
        "bert.encoder.layer.0.output.dense.weight",
        "bert.encoder.layer.0.output.dense.bias",
        "classifier.weight",
        "classifier.bias",
    ]
    biases = [s.name for s in pet.segments if s.kind == "bitfit"]
    assert "bert.encoder.layer.0.output.dense" not in biases
    assert "bert.encoder.layer.1.output.dense" in biases
    with pytest.raises(StructureError, match=r"'pooled' fits none.*bert, dropout, classifier"):
        get_pet_model(_base(), PetConfig(modules_to_save=["pooled"]))
    with pytest.raises(ConfigError, match=r"must be a list of names, got 'classifier'"):
        PetConfig(modules_to_save="classifier")


def test_targets_are_named_by_end_by_role_by_pattern_or_not_at_all() -> None:
    layers = [f"bert.encoder.layer.{i}" for i in range(2)]
    queries = [f"{layer}.attention.self.query" for layer in layers]
    ups = [f"{layer}.intermediate.dense" for layer in layers]
    assert _targets(LoraConfig(target_modules=["query"])) == queries
    assert _targets(LoraConfig(target_modules=["ffn-up"])) == ups
    assert _targets(LoraConfig(target_modules=["layer.1.attention.self.query"])) == queries[1:]
    assert _targets(LoraConfig(target_modules=r".*\.1\..*\.query")) == queries[1:]
    assert len(_targets(LoraConfig(target_modules="all-linear"))) == 13  # and the pooler
    assert len(_targets(LoraConfig())) == 4
    assert len(_targets(HiwiConfig(on="weight"))) == 4
    assert _targets(CustomModuleConfig(kind="lora", target_modules=["query"])) == queries
    assert len(_targets(AdapterConfig())) == 4
    norms = _targets(LayerNormConfig(weight=False))
    assert norms == _targets(LayerNormConfig(bias=False))
    assert sorted(_targets(LayerNormConfig())) == sorted([*norms, *norms])
    assert _targets(LayerNormConfig(), "llama") == _targets(LayerNormConfig(bias=False), "llama")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(target_modules=["quarry"]), r"'quarry' fits none.*query"),
        (LoraConfig(target_modules=["query", "LayerNorm"]), r"'LayerNorm' fits none"),
        (LoraConfig(target_modules=r"(query"), r"regular expression, got '\(query'"),
        (AdapterConfig(target_modules=["query"]), r"'query' fits none.*self-attention"),
        (LayerNormConfig(target_modules=["dense"]), r"'dense' fits none.*attention-norm"),
    ],
)
def test_a_target_that_is_not_there_is_refused_with_those_that_are(
    config: Any, message: str
) -> None:
    with pytest.raises(StructureError, match=message):
        get_pet_model(_base(), PetConfig(modules=[config]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoraConfig(r=0), r"r of LoraConfig must be a whole number of at least 1, got 0"),
        (lambda: HiwiConfig(r=2.0), r"r of HiwiConfig must be a whole number"),
        (lambda: AdapterConfig(r=True), r"r of AdapterConfig must be a whole number"),
        (lambda: LoraConfig(lora_alpha=0), r"lora_alpha must be above 0"),
        (lambda: LoraConfig(lora_alpha=float("nan")), r"lora_alpha must be above 0"),
        (lambda: HiwiConfig(on="gain"), r"must be 'bias' or 'weight', got 'gain'"),
        (lambda: LayerNormConfig(weight=False, bias=False), r"weight, bias or both"),
        (lambda: CustomModuleConfig(kind="prefix"), r"must be a registered one .*got 'prefix'"),
        (lambda: PetConfig(modules=["lora"]), r"such as LoraConfig\(r=8\), got 'lora'"),
    ],
)
def test_a_configuration_out_of_range_is_refused_where_it_is_made(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_norms_without_biases_have_none_to_train() -> None:
    with pytest.raises(StructureError, match=r"have none in this model: train their gains"):
        get_pet_model(_base("llama"), PetConfig(modules=[LayerNormConfig(weight=False)]))


def test_a_model_that_is_adapted_already_is_refused_until_it_is_unloaded() -> None:
    base = _base()
    pet = get_pet_model(base, ALL)
    for again in (base, pet):
        with pytest.raises(BackboneError, match=r"already. Call unload\(\) or merge_and_unload"):
            get_pet_model(again, ALL)
    pet.unload()
    get_pet_model(base, ALL)


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ConfigError, match="must name something to train"):
        get_pet_model(_base(), PetConfig(modules_to_save=[]))


def test_half_precision_is_refused_before_and_after() -> None:
    with pytest.raises(BackboneError, match=r"must be float32.*torch.float16.*or torch.bfloat16"):
        get_pet_model(_base().half(), ALL)
    pet = get_pet_model(_base(), ALL)
    with pytest.raises(BackboneError, match=r"must be float32.*a PetModel.*bfloat16"):
        pet.bfloat16()


def test_a_structure_stands_for_the_modules() -> None:
    name = "bert.encoder.layer.0.attention.self.query"
    structure = Structure((ModuleSpec("lora", name, 3, 1.0),))
    pet = get_pet_model(_base(), PetConfig(modules=structure))
    assert [s.name for s in pet.segments if s.kind == "lora"] == [name]


def test_unloading_gives_the_very_model_back_as_it_was() -> None:
    base = _base()
    before = {key: value.clone() for key, value in base.state_dict().items()}
    pet = get_pet_model(base, ALL)
    pet.set_delta(torch.randn(pet.num_values))
    assert pet.unload() is base
    assert {type(p) for p in base.parameters()} == {torch.nn.Parameter}
    assert all(torch.equal(before[key], value) for key, value in base.state_dict().items())
    assert list(base.state_dict()) == list(before)
    assert not base._forward_pre_hooks


def test_merging_gives_the_very_model_back_with_its_own_class_and_names(tmp_path: Any) -> None:
    import transformers as t

    base, inputs = _base(), batch("bert")
    names = list(base.state_dict())
    pet = get_pet_model(base, ALL)
    pet.set_delta(0.1 * torch.randn(pet.num_values, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        adapted = pet(**inputs).logits
        merged = pet.merge_and_unload()
        assert merged is base
        assert type(merged) is t.BertForSequenceClassification
        assert list(merged.state_dict()) == names
        torch.testing.assert_close(merged(**inputs).logits, adapted, rtol=1e-5, atol=1e-5)
        merged.save_pretrained(tmp_path)
        loaded = t.AutoModelForSequenceClassification.from_pretrained(tmp_path)
        torch.testing.assert_close(loaded(**inputs).logits, adapted, rtol=1e-5, atol=1e-5)


def test_a_step_that_was_not_followed_by_a_pass_is_merged_too() -> None:
    inputs, deltas = batch("bert"), []
    for copied in (True, False):
        pet = get_pet_model(_base(), ALL)
        optimizer = torch.optim.AdamW(pet.parameters(), lr=0.1, fused=True)
        loss_of(pet, inputs).backward()
        optimizer.step()
        merged = pet.merged() if copied else pet.merge_and_unload()
        with torch.no_grad():
            deltas.append(merged(**inputs).logits)
            assert not torch.allclose(deltas[-1], _base()(**inputs).logits, atol=1e-3)
    assert torch.equal(*deltas)


def test_a_change_of_type_moves_all_and_an_optimiser_keeps_its_parameters() -> None:
    pet, inputs = get_pet_model(_base(), ALL), batch("bert")
    optimizer = torch.optim.SGD(pet.parameters(), lr=1e-3)
    pet.set_delta(0.02 * torch.randn(pet.num_values, generator=torch.Generator().manual_seed(0)))
    here, shown = pet.get_delta(), list(pet.parameters())
    with torch.no_grad():
        before = pet(**inputs).logits
        assert pet.to("cpu") is pet
        assert pet.double() is pet
        assert pet.dtype == torch.float64
        assert all(one is other for one, other in zip(pet.parameters(), shown, strict=True))
        assert {p.dtype for p in pet.parameters()} == {torch.float64}
        torch.testing.assert_close(pet(**inputs).logits.float(), before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pet.get_delta(), here, rtol=0, atol=1e-7)
    pet.float()
    loss_of(pet, inputs).backward()
    optimizer.step()
    assert not torch.allclose(pet.get_delta(), here)


def test_what_trains_is_counted_as_peft_counts_it_and_the_upload_beside_it(capsys: Any) -> None:
    base = _base()
    dense = sum(parameter.numel() for parameter in base.parameters())
    pet = get_pet_model(base, PetConfig(modules=[LoraConfig(r=2)]))
    pet.print_trainable_parameters()
    lora, head = 2 * 4 * 32, 2 * 32 + 2
    share, upload = 100 * (lora + head) / (dense + lora), 100 * (lora + head) / dense
    assert capsys.readouterr().out == (
        f"trainable params: {lora + head} || all params: {dense + lora:,} || "
        f"trainable%: {share:.4f}\n"
        f"upload a round (float32): {4 * (lora + head):,} bytes || "
        f"dense FedAvg: {4 * dense:,} bytes || "
        f"upload%: {upload:.4f}\n"
    )
    assert isinstance(pet, PetModel)
