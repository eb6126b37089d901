"""The model as its callers see it: groups, values in and out, gates, the real MiniLM."""

from __future__ import annotations

import pytest
import torch
from architectures import backbone, batch, mask_of, structure_of, train
from torch import Tensor

from fedpet.errors import BackboneError, StructureError
from fedpet.pet.model import PetModel
from fedpet.pet.structure import ModuleSpec, Structure

ALL = "lnfit+bitfit+ln-bias+lora+lora-factors+hiwi-bias+hiwi-weight+lowrank-adapter"


def _pet(names: str = ALL, density: float = 0.1, seed: int = 7) -> PetModel:
    base = backbone("bert")
    return PetModel(base, mask_of(base, density), structure_of(base, names), seed=seed)


def test_zero_values_are_the_checkpoint() -> None:
    base, inputs = backbone("bert"), batch("bert")
    with torch.no_grad():
        before = base.model(**inputs).logits
        names = "lnfit+bitfit+ln-bias+lora+lora-factors+hiwi-bias+hiwi-weight"
        pet = PetModel(base, mask_of(base), structure_of(base, names), seed=7)
        assert not pet.get_delta().any()
        assert torch.equal(pet.model(**inputs).logits, before)


def test_values_that_were_loaded_come_back_with_the_same_bits() -> None:
    pet = _pet()
    values = torch.randn(pet.num_values)
    pet.set_delta(values, seed=1)
    assert torch.equal(pet.get_delta(), values)
    assert pet.get_delta().dtype == torch.float32


def test_loading_forgets_what_was_loaded_and_trained_before() -> None:
    values = 0.1 * torch.randn(_pet().num_values)
    inputs = batch("bert")
    fresh = _pet()
    fresh.set_delta(values, seed=5)
    used = _pet()
    used.set_delta(torch.randn(used.num_values), seed=3)
    train(used, inputs, steps=3)
    used.set_delta(values, seed=5)
    for key, value in fresh.model.state_dict().items():
        assert torch.equal(used.model.state_dict()[key], value), key
    assert train(used, inputs, steps=3) == train(fresh, inputs, steps=3)
    assert torch.equal(used.get_delta(), fresh.get_delta())


def test_the_same_seed_draws_the_same_modules_whatever_was_drawn_before() -> None:
    first = _pet()
    torch.manual_seed(99)
    torch.randn(7)
    second, other = _pet(), _pet(seed=8)
    values = torch.randn(first.num_values)
    outputs = []
    for pet in (first, second, other):
        pet.set_delta(values, seed=1)
        outputs.append(pet.model(**batch("bert")).logits)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_the_adapters_on_biases_start_anew_with_every_piece_of_work() -> None:
    pet = _pet("hiwi-bias", density=0.01)
    values = 0.1 * torch.randn(pet.num_values)
    group = pet.parameter_groups()["hiwi-bias"]
    starts = []
    for seed in (1, 2, 1):
        pet.set_delta(values, seed=seed)
        starts.append(group.detach().clone())
        train(pet, batch("bert"), steps=2)
        assert not torch.equal(pet.get_delta(), values)
    assert torch.equal(starts[0], starts[2])
    assert not torch.equal(starts[0], starts[1])


def test_segments_tile_the_values_mask_first_then_structure_then_head() -> None:
    pet = _pet("lora+lnfit")
    start = 0
    for segment in pet.segments:
        assert segment.start == start
        start += segment.size
    assert start == pet.num_values == len(pet.get_delta())
    kinds = list(dict.fromkeys(segment.kind for segment in pet.segments))
    assert kinds == ["mask", "lora", "lnfit", "head"]
    assert list(pet.parameter_groups()) == kinds


def test_all_trainables_lie_in_one_storage_and_so_do_their_gradients() -> None:
    pet = _pet()
    groups = pet.parameter_groups().values()
    assert len({group.untyped_storage().data_ptr() for group in groups}) == 1
    assert len({group.grad.untyped_storage().data_ptr() for group in groups}) == 1
    total = groups.__iter__().__next__().untyped_storage().nbytes()
    assert sum(group.numel() * 4 for group in groups) == total
    train(pet, batch("bert"))
    assert len({group.grad.untyped_storage().data_ptr() for group in groups}) == 1
    assert all(group.grad.abs().max() > 0 for group in groups)


def test_rank_order_is_what_is_communicated() -> None:
    base = backbone("bert")
    mask = mask_of(base)
    pet = PetModel(base, mask, Structure(), seed=0)
    pet.set_delta(torch.arange(pet.num_values, dtype=torch.float32), seed=0)
    plain = backbone("bert").model.state_dict()
    for segment in (s for s in pet.segments if s.kind == "mask"):
        positions = mask.positions[segment.name]
        got = pet.model.get_parameter(segment.name).flatten()[positions]
        start = plain[segment.name].flatten()[positions]
        wanted = start + torch.arange(segment.start, segment.start + segment.size)
        assert torch.equal(got, wanted)


def test_gates_of_one_change_nothing_and_gates_of_zero_take_the_modules_off() -> None:
    pet = _pet(ALL.replace("+hiwi-bias", ""), density=0.01)
    inputs = batch("bert")
    values = torch.zeros(pet.num_values)
    for segment in pet.segments:
        if segment.kind not in ("mask", "head"):
            values[segment.start : segment.start + segment.size] = 0.3 * torch.randn(segment.size)
    pet.set_delta(values, seed=0)
    count = len(structure_of(backbone("bert"), ALL.replace("+hiwi-bias", "")).modules)
    with torch.no_grad():
        free = pet.model(**inputs).logits
        pet.set_gates(torch.ones(count))
        torch.testing.assert_close(pet.model(**inputs).logits, free, rtol=1e-5, atol=1e-5)
        pet.set_gates(torch.zeros(count))
        plain = backbone("bert").model(**inputs).logits
        torch.testing.assert_close(pet.model(**inputs).logits, plain, rtol=1e-5, atol=1e-5)
        pet.set_gates(None)
        assert torch.equal(pet.model(**inputs).logits, free)


def test_each_gate_gets_the_gradient_of_its_own_module() -> None:
    base = backbone("bert", torch.float64)
    structure = structure_of(base, ALL)
    pet = PetModel(base, None, structure, seed=7)
    pet.set_delta(0.3 * torch.randn(pet.num_values), seed=0)
    with torch.no_grad():  # off its start, where an adapter on a bias changes nothing
        pet.parameter_groups()["hiwi-bias"].add_(0.1)
    inputs = batch("bert")
    gates = torch.rand(len(structure.modules), dtype=torch.float64).requires_grad_()

    def loss(gates: Tensor) -> Tensor:
        pet.set_gates(gates)
        return pet.model(**inputs).logits.square().sum()

    loss(gates).backward()
    assert gates.grad is not None
    direction = torch.randn_like(gates)
    with torch.no_grad():
        change = loss(gates + 1e-6 * direction) - loss(gates - 1e-6 * direction)
    assert float(change / 2e-6) == pytest.approx(float(gates.grad @ direction), rel=1e-5)
    kinds = {}
    for spec, gradient in zip(structure.modules, gates.grad.tolist(), strict=True):
        kinds[spec.kind] = max(kinds.get(spec.kind, 0.0), abs(gradient))
    assert min(kinds.values()) > 0
    assert all(group.grad.abs().max() > 0 for kind, group in pet.parameter_groups().items())
    with pytest.raises(ValueError, match="one a module of the structure"):
        pet.set_gates(torch.ones(3))


def test_values_of_another_layout_are_refused() -> None:
    pet = _pet("lnfit")
    with pytest.raises(ValueError, match="belong to another mask or structure"):
        pet.set_delta(torch.zeros(3), seed=0)


def test_a_mask_of_another_backbone_is_refused() -> None:
    base = backbone("bert")
    mask = mask_of(base)
    name = next(iter(mask.positions))
    with pytest.raises(StructureError, match=r"'x\.weight' is none in this backbone"):
        PetModel(base, type(mask)({"x.weight": torch.tensor([0])}, {}), Structure(), seed=0)
    with pytest.raises(StructureError, match="reach 9999, and it has 1024 entries"):
        PetModel(base, type(mask)({name: torch.tensor([9999])}, {}), Structure(), seed=0)


def test_half_precision_weights_are_refused_with_what_to_do() -> None:
    base = backbone("bert", torch.float16)
    with pytest.raises(BackboneError, match=r"must be float32.*or torch.bfloat16"):
        PetModel(base, None, Structure(), seed=0)


def test_a_merged_model_shares_no_memory_and_can_be_saved(tmp_path: object) -> None:
    from transformers import AutoModelForSequenceClassification

    pet = _pet("lnfit+lora+hiwi-bias")
    train(pet, batch("bert"), steps=2)
    merged = pet.merged()
    ours = {p.untyped_storage().data_ptr() for p in pet.model.parameters()}
    theirs = [p.untyped_storage().data_ptr() for p in merged.parameters()]
    assert not ours & set(theirs)
    assert len(theirs) == len(set(theirs))
    merged.save_pretrained(tmp_path)
    read = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        wanted = pet.model(**batch("bert")).logits
        torch.testing.assert_close(read(**batch("bert")).logits, wanted, rtol=0, atol=1e-5)


def test_one_module_on_a_target_is_one_segment() -> None:
    base = backbone("bert")
    target = "bert.encoder.layer.0.output.dense"
    both = Structure((ModuleSpec("hiwi-bias", target, 2), ModuleSpec("bitfit", target)))
    pet = PetModel(base, None, both, seed=0)
    assert [s.kind for s in pet.segments if s.name == target] == ["bitfit"]
    values = torch.randn(pet.num_values)
    pet.set_delta(values, seed=0)
    assert torch.equal(pet.get_delta(), values)
    train(pet, batch("bert"), steps=3)
    with torch.no_grad():
        adapted = pet.model(**batch("bert")).logits
        served = pet.merged()(**batch("bert")).logits
    torch.testing.assert_close(served, adapted, rtol=1e-5, atol=1e-5)
