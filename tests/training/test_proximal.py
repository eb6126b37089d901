"""FedProx's term: its gradient is that of the values that are sent, whatever is trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from tiny import Silent

from fedpet.backbone.module_roles import find_target_modules, maskable_weights
from fedpet.backbone.pretrained import load_backbone
from fedpet.config import BackboneConfig, Experiment, MaskConfig
from fedpet.errors import ConfigError
from fedpet.pet.mask import build_mask
from fedpet.pet.model import PetModel
from fedpet.pet.structure import preset
from fedpet.training.loss import proximal_gradient

STRUCTURES = ("lnfit+ln-bias+lora", "hiwi-bias", "bitfit+hiwi-bias", "hiwi-weight", "lora-factors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_backbone(tmp_path_factory.mktemp("proximal") / "backbone")


def make(folder: Path, structure: str) -> PetModel:
    backbone = load_backbone(BackboneConfig(model=str(folder)), num_outputs=2)
    backbone.model.double()
    mask = build_mask(maskable_weights(backbone.model, backbone.head), MaskConfig(density=0.02))
    positions = find_target_modules(backbone.model, backbone.head)
    built = preset(structure, positions, rank=2, scale=1.0)
    return PetModel(backbone, mask, built, seed=3)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_gradient_is_that_of_the_squared_distance_of_the_values(
    folder: Path, structure: str
) -> None:
    pet = make(folder, structure)
    generator = torch.Generator().manual_seed(1)
    start = 0.1 * torch.randn(pet.num_values, generator=generator)
    pet.set_delta(start, seed=5)
    before = sent(pet)
    add = proximal_gradient(0.7, *pet.sent_values())
    groups = list(pet.parameter_groups().values())
    with torch.no_grad():
        for group in groups:
            group.add_(0.05 * torch.randn(group.shape, generator=generator).to(group))
    add()
    for _ in range(3):  # along random directions, by central differences
        steps = [torch.randn(g.shape, generator=generator).to(g) for g in groups]
        expected = sum(
            float((g.grad * step).sum())
            for g, step in zip(groups, steps, strict=True)
            if g.grad is not None
        )
        measured = []
        for sign in (1e-5, -2e-5, 1e-5):
            with torch.no_grad():
                for group, step in zip(groups, steps, strict=True):
                    group.add_(step, alpha=sign)
            measured.append(0.35 * float((sent(pet) - before).square().sum()))
        assert expected == pytest.approx((measured[0] - measured[1]) / 2e-5, rel=1e-5)


def sent(pet: PetModel) -> torch.Tensor:
    """The values, not rounded to float32 as they are when they travel."""
    with torch.no_grad():
        return torch.cat([module.read() for module in pet._pet_modules if module.num_values])


def test_the_gradient_vanishes_at_the_global_values(folder: Path) -> None:
    pet = make(folder, "hiwi-bias")
    pet.set_delta(torch.ones(pet.num_values), seed=5)
    add = proximal_gradient(3.0, *pet.sent_values())
    add()
    gradients = [group.grad for group in pet.parameter_groups().values()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_a_strong_term_keeps_a_client_near_the_global_values(tmp_path: Path) -> None:
    from fedpet.client.node import Node
    from fedpet.client.node_config import NodeConfig
    from fedpet.run.federate import federate, prepare
    from fedpet.run.local_grid import LocalGrid
    from fedpet.run.run_folder import new_run_folder

    backbone, rows = tiny.make_backbone(tmp_path / "b"), tiny.make_rows(tmp_path / "r")
    moved = {}
    for mu in (1e-6, 1e3):
        settings = tiny.make_experiment(
            backbone,
            rows,
            tmp_path / f"run{mu}",
            strategy_name="fedprox",
            strategy_num_rounds=1,
            training_proximal_mu=mu,
            training_optimizer="sgd",
            training_learning_rate=1e-3,
            training_clip_norm=0.0,
            structure_preset="lnfit",
        )
        grid = LocalGrid({1: Node(NodeConfig.from_experiment(settings)).answer})
        federate(grid, prepare(settings, Silent()), new_run_folder(settings), Silent())
        values = np.load(Path(settings.run.out) / "checkpoint" / "values.npy")
        moved[mu] = float(np.linalg.norm(values))
    assert 0 < moved[1e3] < 0.8 * moved[1e-6]


def test_fedprox_without_a_term_and_a_term_without_fedprox_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'fedprox' needs training\.proximal-mu above 0"):
        Experiment.from_tables({"strategy": {"name": "fedprox"}})
    with pytest.raises(ConfigError, match="name the strategy 'fedprox'"):
        Experiment.from_tables({"training": {"proximal-mu": 0.1}})
    Experiment.from_tables({"training": {"proximal-mu": 0.1}, "strategy": {"name": "fedadam"}})
