"""Dense weights in 8 or 4 bits: the laws hold on the numbers that the stored bits mean."""

from __future__ import annotations

import copy
import hashlib
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from architectures import (
    ARCHITECTURES,
    backbone,
    batch,
    gradient_of,
    loss_of,
    mask_of,
    structure_of,
    train,
)
from language_models import model_of
from torch import Tensor

from fedpet.backbone.module_roles import maskable_weights
from fedpet.backbone.pretrained import Backbone, fingerprint
from fedpet.backbone.quantised import BLOCK, QuantisedWeight, dequantise, plain, quantise
from fedpet.config import MaskConfig
from fedpet.pet.client_stack import ClientStack
from fedpet.pet.mask import build_mask
from fedpet.pet.mask_ties import describe_ties
from fedpet.pet.model import PetModel
from fedpet.training.block_checkpointing import checkpoint_blocks
from fedpet.training.cls_only import first_token_only

pytest.importorskip("bitsandbytes")
BITS = (8, 4)


def weight_of(rows: int = 6, columns: int = 64) -> Tensor:
    """Numbers that every machine makes alike, of other sizes from row to row; one row is zeros."""
    state = np.arange(1, rows * columns + 1, dtype=np.uint64)
    words = (state * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)  # 24 bits
    numbers = (words.astype(np.float32) / np.float32(2**23) - np.float32(1)).reshape(rows, columns)
    numbers *= np.float32(2) ** -np.arange(rows, dtype=np.float32)[:, None]
    numbers[2] = 0
    return torch.from_numpy(numbers)


def pair(name: str, bits: int, dtype: torch.dtype = torch.float32) -> tuple[Backbone, Backbone]:
    """A backbone with quantised weights, and one with their numbers as plain weights."""
    stored, dense = backbone(name, dtype), backbone(name, dtype)
    for base in (stored, dense):
        quantise(base.model, bits, base.head)
    dequantise(dense.model)
    return stored, dense


def adapted(base: Backbone, kinds: str = "lora+lnfit", density: float = 0.1) -> PetModel:
    return PetModel(base, mask_of(base, density), structure_of(base, kinds), seed=7)


def quantised_names(model: torch.nn.Module) -> list[str]:
    return [n for n, p in model.named_parameters() if isinstance(p, QuantisedWeight)]


# The stored bits.


def test_8_bits_are_the_nearest_of_equal_steps_of_each_block_s_largest() -> None:
    weight = weight_of()
    found = QuantisedWeight.of(weight, 8)
    blocks = weight.numpy().reshape(-1, BLOCK)
    scales = np.abs(blocks).max(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = np.nan_to_num(np.rint(blocks * (np.float32(127) / scales[:, None]))).astype(np.int8)
    assert np.array_equal(found.stored.numpy(), steps)
    assert np.array_equal(found.scales.numpy(), scales)
    numbers = steps.astype(np.float32) * (scales * np.float32(1 / 127))[:, None]
    assert np.array_equal(plain(found).numpy(), numbers.reshape(weight.shape))
    assert (plain(found) - weight).abs().max() <= weight.abs().max() / 254 * 1.001


def test_4_bits_are_the_nearest_level_of_nf4() -> None:
    from bitsandbytes.functional import get_4bit_type

    weight = weight_of()
    found = plain(QuantisedWeight.of(weight, 4))
    levels = get_4bit_type("nf4", device="cpu")
    blocks, scales = weight.view(-1, BLOCK), weight.view(-1, BLOCK).abs().amax(1, keepdim=True)
    distance = (blocks[..., None] - levels * scales[..., None]).abs()
    reached = (blocks - found.view(-1, BLOCK)).abs()
    assert torch.allclose(reached, distance.amin(-1), rtol=0, atol=1e-6)
    assert torch.unique(found.view(-1, BLOCK)[0]).numel() <= 16


@pytest.mark.parametrize(
    ("bits", "stored", "read"),
    [(8, "be4c941ea3c1c41c", "45e2514165466bdd"), (4, "b04359782e8cfb07", "aa354d8a81826258")],
)
def test_every_machine_stores_and_reads_the_same_bits(bits: int, stored: str, read: str) -> None:
    found = QuantisedWeight.of(weight_of(), bits)
    digest = hashlib.sha256(found.stored.numpy().tobytes() + found.scales.numpy().tobytes())
    assert digest.hexdigest()[:16] == stored
    assert hashlib.sha256(plain(found).numpy().tobytes()).hexdigest()[:16] == read


@pytest.mark.parametrize("bits", BITS)
def test_bits_do_not_depend_on_threads_and_bfloat16_is_the_rounded_float32(bits: int) -> None:
    weight = weight_of(48)
    before = torch.get_num_threads()
    one = QuantisedWeight.of(weight, bits)
    try:
        torch.set_num_threads(3)
        other = QuantisedWeight.of(weight, bits)
        assert torch.equal(one.stored, other.stored)
        assert torch.equal(plain(one), plain(other))
    finally:
        torch.set_num_threads(before)
    rounded = weight.bfloat16()
    exact = QuantisedWeight.of(rounded.float(), bits)
    assert torch.equal(plain(QuantisedWeight.of(rounded, bits)), plain(exact).bfloat16())


def test_it_takes_17_or_9_sixteenths_of_a_byte_a_weight_over_8_or_4_bits() -> None:
    weight = weight_of(64)
    sizes = [QuantisedWeight.of(weight, bits).nbytes_stored / weight.numel() for bits in BITS]
    assert sizes == [1 + 1 / 16, 1 / 2 + 1 / 16]


def test_what_would_write_into_it_is_an_error() -> None:
    weight = QuantisedWeight.of(weight_of(), 8)
    with pytest.raises(RuntimeError, match="never written"):
        weight.mul_(2)
    other = torch.zeros(6, 64)
    assert torch.equal(other.copy_(weight), plain(weight))


@pytest.mark.parametrize("bits", BITS)
def test_copies_pickles_and_other_types_hold_the_same_bits(bits: int) -> None:
    model = pair("llama", bits)[0].model
    names, print_of = quantised_names(model), fingerprint(model.named_parameters())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.to("cpu")):
        assert quantised_names(other) == names
        assert fingerprint(other.named_parameters()) == print_of
    halved = copy.deepcopy(model).to(torch.bfloat16)
    for name in names:
        assert halved.get_parameter(name).dtype == torch.bfloat16
        rounded = plain(model.get_parameter(name)).bfloat16()
        assert torch.equal(plain(halved.get_parameter(name)), rounded)


# The model.


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_a_mask_may_choose_from_is_quantised_and_nothing_else(name: str) -> None:
    base, before = backbone(name), backbone(name).model.state_dict()
    whole = {n for n, w in maskable_weights(base.model, base.head).items() if w.numel() % 64 == 0}
    quantise(base.model, 4, base.head)
    assert set(quantised_names(base.model)) == whole != set()
    for key, value in base.model.named_parameters():
        same = torch.equal(plain(value), before[key])
        assert same == (key not in whole), key


@pytest.mark.parametrize(
    ("bits", "dtype"), [(8, torch.float32), (4, torch.float32), (4, torch.bfloat16)]
)
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_at_zero_values_it_is_the_model_of_the_numbers_to_the_bit(
    name: str, bits: int, dtype: torch.dtype
) -> None:
    stored, dense = pair(name, bits, dtype)
    inputs = batch(name)
    expected = adapted(dense).model(**inputs).logits
    assert torch.equal(adapted(stored).model(**inputs).logits, expected)
    assert not torch.equal(adapted(backbone(name, dtype)).model(**inputs).logits, expected)


@pytest.mark.parametrize(("bits", "density"), [(8, 0.02), (4, 0.5)])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "albert", "t5"])
def test_gradients_and_steps_are_those_on_the_dense_numbers(
    name: str, bits: int, density: float
) -> None:
    pets = [adapted(base, density=density) for base in pair(name, bits)]
    inputs = batch(name)
    gradients = [gradient_of(pet, inputs) for pet in pets]
    assert gradients[0].abs().max() > 0
    assert torch.equal(*gradients)
    losses = [train(pet, inputs, steps=3) for pet in pets]
    assert losses[0] == losses[1]
    assert torch.equal(pets[0].get_delta(), pets[1].get_delta())


@pytest.mark.parametrize("kinds", ["hiwi-weight", "lora-factors", "none"])
def test_modules_on_weights_read_the_numbers(kinds: str) -> None:
    pets = [adapted(base, kinds) for base in pair("bert", 4)]
    losses = [train(pet, batch("bert"), steps=2) for pet in pets]
    assert losses[0] == losses[1]
    assert torch.equal(pets[0].get_delta(), pets[1].get_delta())


def test_recomputed_blocks_and_passes_cut_to_the_first_token_give_the_same_bits() -> None:
    found = []
    for base in pair("bert", 8):
        pet, inputs = adapted(base), batch("bert")
        with first_token_only(pet.model, inputs):
            loss_of(pet.model, inputs).backward()
        checkpoint_blocks(pet.model)
        loss_of(pet.model, inputs).backward()
        found.append(torch.cat([group.grad.flatten() for group in pet.parameters()]))
    assert float(found[0].abs().max()) > 0
    assert torch.equal(*found)


def test_no_plain_copy_of_a_weight_is_kept_for_the_pass_backwards() -> None:
    pet = PetModel(pair("llama", 8)[0], None, structure_of(backbone("llama"), "lnfit"), seed=0)
    shapes = {tuple(p.shape) for p in pet.model.parameters() if isinstance(p, QuantisedWeight)}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(pet.model, batch("llama")).backward()
    dense = {tuple(t.shape) for t in kept if not isinstance(t, QuantisedWeight)}
    assert not shapes & (dense | {shape[::-1] for shape in dense})


@pytest.mark.parametrize("bits", BITS)
def test_many_clients_at_once_pass_as_each_alone(bits: int) -> None:
    pet = adapted(pair("bert", bits)[0])
    stack = ClientStack(pet, np.zeros(pet.num_values, np.float32), seeds=[1, 2])
    stack.check(batch("bert", rows=4))


# The mask and the fingerprint.


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rule", ["smallest", "largest"])
def test_the_mask_is_that_of_the_numbers(bits: int, rule: str) -> None:
    config = MaskConfig(density=0.3, rule=rule)
    scopes = [maskable_weights(base.model, base.head) for base in pair("llama", bits)]
    masks = [build_mask(scope, config) for scope in scopes]
    assert masks[0].digest() == masks[1].digest()
    original = backbone("llama")
    other = build_mask(maskable_weights(original.model, original.head), config)
    assert masks[0].digest() != other.digest()
    assert describe_ties(scopes[0], masks[0], config) == describe_ties(scopes[1], masks[1], config)


def test_fingerprints_are_of_the_numbers_one_for_each_number_of_bits() -> None:
    found = {}
    for bits in (0, *BITS):
        bases = [backbone("llama"), backbone("llama")]
        for base in bases:
            if bits:
                quantise(base.model, bits, base.head)
        prints = {fingerprint(base.model.named_parameters()) for base in bases}
        assert len(prints) == 1
        found[bits] = prints.pop()
        assert adapted(bases[0]).fingerprint() == fingerprint(
            (n, p) for n, p in bases[1].model.named_parameters() if n not in bases[1].head
        )
    assert len(set(found.values())) == 3


def test_unloading_gives_the_quantised_model_back() -> None:
    stored, dense = pair("bert", 8)
    pet = adapted(stored)
    train(pet, batch("bert"), steps=2)
    model = pet.unload()
    assert quantised_names(model)
    assert torch.equal(model(**batch("bert")).logits, dense.model(**batch("bert")).logits)


def test_a_pet_model_is_copied_and_moved_with_its_bits() -> None:
    pet = adapted(pair("bert", 4)[0])
    train(pet, batch("bert"), steps=2)
    twin = copy.deepcopy(pet)
    assert quantised_names(twin.model) == quantised_names(pet.model) != []
    expected = pet.model(**batch("bert")).logits
    assert torch.equal(twin.model(**batch("bert")).logits, expected)
    assert torch.allclose(twin.double().model(**batch("bert")).logits.float(), expected, atol=1e-4)


# The merged model.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", BITS)
def test_a_merged_model_is_plain_and_generates_the_adapted_one_s_tokens(
    bits: int, dtype: torch.dtype
) -> None:
    model = model_of("llama-tied").to(dtype)
    quantise(model.requires_grad_(False), bits)
    base = Backbone.of_model(model, ())
    pet = PetModel(base, mask_of(base, 0.1), structure_of(base, "lora"), seed=0)
    generator = torch.Generator().manual_seed(0)
    pet.set_delta(0.2 * torch.randn(pet.num_values, generator=generator))
    ids = torch.tensor([[1, 6, 9, 7], [1, 12, 4, 5]])
    asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 8}
    asked |= {"do_sample": False, "pad_token_id": 2, "eos_token_id": None}
    expected = pet.model.generate(**asked)
    merged = pet.merged()
    assert not quantised_names(merged)
    assert {p.dtype for p in merged.parameters()} == {dtype}
    assert torch.equal(merged.generate(**asked), expected)
    in_place = pet.merge_and_unload().state_dict()
    assert all(torch.equal(value, in_place[key]) for key, value in merged.state_dict().items())


def test_tiers_and_shared_settings_read_the_same_numbers() -> None:
    outputs = []
    for base in pair("bert", 8):
        for shared in (False, True):
            own = replace(base, model=copy.deepcopy(base.model), shared=shared)
            config = MaskConfig(density=0.1, tiers=("0.02=0.5", "0.1=0.5"))
            mask = build_mask(maskable_weights(own.model, own.head), config)
            pet = PetModel(own, mask, structure_of(own, "lnfit"), seed=0)
            pet.set_tier(0)
            pet.set_delta(0.05 * torch.ones(pet.num_values))
            outputs.append(pet.model(**batch("bert")).logits)
    assert all(torch.equal(output, outputs[0]) for output in outputs)
