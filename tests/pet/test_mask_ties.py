"""Ties go to the earlier entry however many there are, and a mask made of them is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedpet.client.node_config import NodeConfig
from fedpet.config import MaskConfig
from fedpet.pet.mask import build_mask
from fedpet.pet.mask_ties import describe_ties
from fedpet.run.federate import federate, prepare
from fedpet.run.local_grid import LocalGrid
from fedpet.run.run_folder import new_run_folder


def few_magnitudes(levels: int, zeros: float, *, dtype: torch.dtype = torch.float32) -> Any:
    """Weights as a coarse quantiser leaves them: a share of exact zeros, few other magnitudes."""
    generator = torch.Generator().manual_seed(3)
    weights = {}
    for name, shape in (("b.weight", (70, 90)), ("a.weight", (50, 60)), ("c.weight", (33, 31))):
        signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
        sizes = torch.randint(1, levels + 1, shape, generator=generator) / levels
        kept = torch.rand(shape, generator=generator) >= zeros
        weights[name] = (signs * sizes * kept).to(dtype)
    return weights


def by_sorting(weights: dict[str, Tensor], num: int, sign: int) -> set[tuple[str, int]]:
    """The rule as it is stated: by magnitude, ties to the earlier entry in the order of names."""
    names = sorted(weights)
    owners = [(name, i) for name in names for i in range(weights[name].numel())]
    flat = torch.cat([weights[name].float().abs().reshape(-1) for name in names])
    order = np.argsort(sign * flat.numpy(), kind="stable")[:num]
    return {owners[i] for i in order}


@pytest.mark.parametrize("rule", ["smallest", "largest"])
@pytest.mark.parametrize("density", [0.001, 0.01, 0.2, 0.7])
@pytest.mark.parametrize(("levels", "zeros"), [(2, 0.0), (7, 0.3), (15, 0.003), (1, 0.5)])
def test_ties_go_to_the_earlier_entry_in_the_order_of_names(
    rule: str, density: float, levels: int, zeros: float
) -> None:
    weights = few_magnitudes(levels, zeros)
    mask = build_mask(weights, MaskConfig(density=density, rule=rule))
    chosen = {(name, int(i)) for name, places in mask.positions.items() for i in places}
    wanted = by_sorting(weights, mask.num_values, 1 if rule == "smallest" else -1)
    assert chosen == wanted


def test_a_mask_of_ties_is_the_same_from_tensors_in_another_order_and_of_another_type() -> None:
    weights = few_magnitudes(4, 0.1)  # exact in bfloat16
    config = MaskConfig(density=0.05)
    digest = build_mask(weights, config).digest()
    turned = dict(reversed(list(weights.items())))
    assert build_mask(turned, config).digest() == digest
    assert build_mask(few_magnitudes(4, 0.1, dtype=torch.bfloat16), config).digest() == digest


def test_rounding_to_bfloat16_is_another_checkpoint_with_a_mask_of_its_own() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {"w": 1 + 1e-3 * torch.rand(400, generator=generator)}
    config = MaskConfig(density=0.1)
    rounded = {"w": weights["w"].bfloat16()}
    assert build_mask(weights, config).digest() != build_mask(rounded, config).digest()
    assert build_mask(rounded, config).positions["w"].tolist() == list(range(40))


# What is told


@pytest.mark.parametrize("share", [0.45, 0.55])
def test_more_than_half_a_mask_of_zeros_is_told_with_the_density_that_would_do(
    share: float,
) -> None:
    weights = {"w": torch.arange(1.0, 1001.0), "v": torch.full((1000,), 2000.0)}
    zeros = int(100 * share)
    weights["w"][:zeros] = 0
    config = MaskConfig(density=0.05)  # 100 entries
    told = describe_ties(weights, build_mask(weights, config), config)
    if share < 0.5:
        assert told == ""
        return
    assert told.startswith(f"{zeros} % of the 100 entries of the mask are exact zeros")
    assert f"{zeros} of the 2,000 in scope" in told
    better = MaskConfig(density=0.055)
    assert "0.055 or more" in told
    assert describe_ties(weights, build_mask(weights, better), better) == ""


@pytest.mark.parametrize("rule", ["smallest", "largest", "random"])
def test_one_magnitude_is_told_too_under_each_rule_that_ranks_by_it(rule: str) -> None:
    weights = {"w": torch.full((400,), -0.25)}
    config = MaskConfig(density=0.1, rule=rule)
    told = describe_ties(weights, build_mask(weights, config), config)
    assert ("have the one magnitude 0.25" in told) == (rule != "random")


@pytest.fixture(scope="module")
def of_zeros(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint a fifth of whose linear weights are zeros."""
    folder = tiny.make_backbone(tmp_path_factory.mktemp("zeros") / "backbone")
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and "embeddings" not in name:
            tensor[::5] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_mask_command_warns_and_says_nothing_at_a_density_of_enough(
    command: Any, of_zeros: Path
) -> None:
    _, _, thin = command("mask", str(of_zeros), "--density", "0.05")
    assert "warning: 100 % of the " in thin
    assert "exact zeros" in thin
    _, _, wide = command("mask", str(of_zeros), "--density", "0.5")
    assert "warning" not in wide


def test_the_mask_command_takes_the_weights_in_the_type_of_a_run(
    command: Any, of_zeros: Path, tmp_path: Path
) -> None:
    for dtype in ("float32", "bfloat16"):
        out = str(tmp_path / dtype)
        options = ["--rule", "largest", "--dtype", dtype, "--out", out]
        assert command("mask", str(of_zeros), *options)[0] == 0
    assert (tmp_path / "float32").read_bytes() != (tmp_path / "bfloat16").read_bytes()


def test_a_run_says_it_once_before_its_rounds(of_zeros: Path, tmp_path: Path) -> None:
    said: list[str] = []

    class Listener(tiny.Silent):
        def on_stage(self, text: str) -> None:
            said.append(text)

        def on_round_end(self, record: Any, ledger: Any) -> None:
            said.append(f"round {record.round}")

    experiment = tiny.make_experiment(
        of_zeros, tiny.make_rows(tmp_path / "rows"), tmp_path / "out", strategy_num_rounds=1
    )
    grid = LocalGrid.of(NodeConfig.from_experiment(experiment), 1)
    federate(grid, prepare(experiment, Listener()), new_run_folder(experiment), Listener())
    [warning] = [text for text in said if "exact zeros" in text]
    assert warning.startswith("warning: ")
    assert said.index(warning) < said.index("round 0")
    assert json.loads((tmp_path / "out" / "result.json").read_text())["run"]["status"] == "ok"


def test_an_ordinary_checkpoint_is_not_warned_of(tmp_path: Path) -> None:
    backbone = tiny.make_backbone(tmp_path / "backbone")
    experiment = tiny.make_experiment(
        backbone, tiny.make_rows(tmp_path / "rows"), tmp_path / "out", strategy_num_rounds=1
    )

    class Strict(tiny.Silent):
        def on_stage(self, text: str) -> None:
            assert "warning" not in text

    grid = LocalGrid.of(NodeConfig.from_experiment(experiment), 1)
    federate(grid, prepare(experiment, Strict()), new_run_folder(experiment), Strict())
