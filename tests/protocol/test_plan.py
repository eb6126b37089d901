"""The plan: what it costs, that it survives its bytes, and that nothing else passes for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from fedpet.backbone.module_roles import find_target_modules, maskable_weights
from fedpet.backbone.pretrained import Backbone, load_backbone
from fedpet.config import BackboneConfig, Experiment, MaskConfig
from fedpet.data import Task
from fedpet.errors import PlanError
from fedpet.pet.mask import build_mask
from fedpet.pet.structure import preset
from fedpet.protocol.plan import Plan, encode_mask
from fedpet.report.mask_table import entropy_bytes

TASK = Task(kind="classification", label_names=("no", "yes"), metric="accuracy")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_backbone(tmp_path_factory.mktemp("tiny") / "backbone")


def load(folder: Path) -> Backbone:
    return load_backbone(BackboneConfig(model=str(folder)), num_outputs=2)


def plan_of(folder: Path, **mask: object) -> Plan:
    tables = {"mask": {"density": 0.05, **mask}, "backbone": {"model": str(folder)}}
    backbone = load(folder)
    structure = preset(
        "lnfit+lora", find_target_modules(backbone.model, backbone.head), rank=2, scale=2.0
    )
    experiment = Experiment.from_tables(tables)
    return Plan.for_training(experiment, backbone, structure, TASK, "0" * 64)[0]


@pytest.mark.parametrize("broadcast", ["recompute", "send"])
def test_a_plan_survives_its_bytes_and_builds_the_same_model(folder: Path, broadcast: str) -> None:
    plan = plan_of(folder, broadcast=broadcast)
    data = plan.to_bytes()
    again = Plan.from_bytes(data)
    assert again == plan
    assert again.to_bytes() == data
    first, second = plan.build(load(folder)), again.build(load(folder))
    assert first.segments == second.segments


def test_an_explicit_and_a_derived_plan_name_the_same_entries_in_the_same_order(
    folder: Path,
) -> None:
    backbone = load(folder)
    derived = plan_of(folder)._mask(backbone)
    explicit = plan_of(folder, broadcast="send")._mask(backbone)
    assert derived is not None
    assert explicit is not None
    assert list(derived.positions) == list(explicit.positions)
    for name, positions in derived.positions.items():
        assert positions.equal(explicit.positions[name])


def test_the_real_mask_at_half_a_percent_costs_at_most_3_percent_over_its_entropy() -> None:
    backbone = load_backbone(BackboneConfig(), num_outputs=2)
    mask = build_mask(maskable_weights(backbone.model, backbone.head), MaskConfig(density=0.005))
    assert mask.num_values == 53_821
    assert entropy_bytes(mask) < len(encode_mask(mask)) <= 1.03 * entropy_bytes(mask)


def test_a_derived_mask_costs_at_most_128_bytes(folder: Path) -> None:
    """The plan with the mask against the plan without one, both as they are sent."""
    derived = len(plan_of(folder).to_bytes())
    without = Experiment.from_tables(
        {"mask": {"enabled": False}, "backbone": {"model": str(folder)}}
    )
    backbone = load(folder)
    structure = preset(
        "lnfit+lora", find_target_modules(backbone.model, backbone.head), rank=2, scale=2.0
    )
    bare = len(Plan.for_training(without, backbone, structure, TASK, "0" * 64)[0].to_bytes())
    assert derived - bare <= 128


def test_another_checkpoint_is_refused_with_both_fingerprints(folder: Path, tmp_path: Path) -> None:
    other = load(tiny.make_backbone(tmp_path / "other", seed=1))
    plan = plan_of(folder)
    with pytest.raises(PlanError) as error:
        plan.build(other)
    assert plan.fingerprint[:16] in str(error.value)
    assert other.fingerprint[:16] in str(error.value)


def test_one_changed_weight_changes_the_fingerprint_and_the_head_does_not(folder: Path) -> None:
    from fedpet.backbone.pretrained import fingerprint

    backbone = load(folder)
    names = dict(backbone.model.named_parameters())
    pretrained = {n: p for n, p in names.items() if n not in backbone.head}
    assert fingerprint(pretrained.items()) == backbone.fingerprint
    assert load_backbone(
        BackboneConfig(model=str(folder), head_seed=5), num_outputs=2
    ).fingerprint == (backbone.fingerprint)
    name = next(iter(pretrained))
    changed = pretrained[name].clone()
    changed.view(-1)[0] += 1e-6
    assert fingerprint((pretrained | {name: changed}).items()) != backbone.fingerprint


def test_the_head_starts_alike_on_every_device_whatever_was_drawn_before(folder: Path) -> None:
    import torch

    first = load(folder)
    torch.rand(17)
    second = load(folder)
    for name in first.head:
        assert first.model.get_parameter(name).equal(second.model.get_parameter(name))


def test_a_mask_by_another_rule_than_the_hash_says_is_refused(folder: Path) -> None:
    from dataclasses import replace

    plan = plan_of(folder)
    assert plan.mask is not None
    lied = replace(plan, mask=replace(plan.mask, rule="largest"))
    with pytest.raises(PlanError, match="the mask computed here is"):
        lied.build(load(folder))


@pytest.fixture(scope="module")
def some_bytes(folder: Path) -> bytes:
    return plan_of(folder, broadcast="send").to_bytes()


@given(data=st.data())
def test_damaged_plans_are_refused_and_never_crash(some_bytes: bytes, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["flip", "cut", "extend", "start"]))
    if kind == "flip":
        at = data.draw(st.integers(0, len(some_bytes) - 1))
        damaged = bytearray(some_bytes)
        damaged[at] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        damaged = bytearray(some_bytes[: data.draw(st.integers(0, len(some_bytes) - 1))])
    elif kind == "extend":
        damaged = bytearray(some_bytes + data.draw(st.binary(min_size=1, max_size=9)))
    else:
        damaged = bytearray(some_bytes)
        damaged[6:14] = data.draw(st.binary(min_size=8, max_size=8))
    try:
        parsed = Plan.from_bytes(bytes(damaged))
    except PlanError:
        return
    # What still parses is another plan, and has another digest: nobody takes it for this one.
    assert Plan.digest(bytes(damaged)) != Plan.digest(some_bytes) or bytes(damaged) == some_bytes
    assert isinstance(parsed, Plan)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "[" * 100_000])
def test_a_header_with_a_number_that_is_none_is_refused(some_bytes: bytes, value: str) -> None:
    import msgspec
    import zstandard

    tag, packed, positions = msgspec.msgpack.decode(some_bytes)
    text = zstandard.ZstdDecompressor().decompress(packed).decode()
    start = text.index('"learning_rate":') + len('"learning_rate":')
    text = text[:start] + value + text[text.index(",", start) :]
    header = zstandard.ZstdCompressor().compress(text.encode())
    with pytest.raises(PlanError, match="the plan does not read"):
        Plan.from_bytes(msgspec.msgpack.encode([tag, header, positions]))
