"""A model on another device computes what it computes on the processor, and so does a whole run.

`second_device` stands for a GPU where there is none; where there is one, the same runs on it too.
"""

from __future__ import annotations

import json
import re
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, backbone, batch, mask_of, structure_of
from fake_gpu import second_device
from in_process_run import run
from safetensors.numpy import load_file
from torch import Tensor

from fedpet.backbone.device import check_device, device_of
from fedpet.backbone.module_roles import maskable_weights
from fedpet.client import train_client
from fedpet.client.node_config import NodeConfig
from fedpet.codec.torch_rotation import rotate_updates
from fedpet.config import MaskConfig, TrainingConfig
from fedpet.data import Rows, Task
from fedpet.errors import ConfigError, RunError
from fedpet.pet.mask import build_mask
from fedpet.pet.model import PetModel
from fedpet.run.local_grid import LocalGrid
from fedpet.run.ray_engine import gpu_share
from fedpet.training.at_once import ClientWork, TrainedClient, train_at_once

STRUCTURES = ("none", "lora-factors+lnfit", "lora+lnfit", "hiwi-weight+lowrank-adapter")
with_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
DEVICES = ["second", pytest.param("cuda", marks=with_gpu)]


def _on(device: str) -> AbstractContextManager[torch.device]:
    return second_device() if device == "second" else nullcontext(torch.device(device))


def _trained(name: str, structure: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, gradients and values after two steps, from a point that is not the checkpoint."""
    base = backbone(name)
    base.model.to(device)
    pet = PetModel(base, mask_of(base), structure_of(base, structure), seed=3)
    inputs = {key: tensor.to(device) for key, tensor in batch(name).items()}
    start = torch.randn(pet.num_values, generator=torch.Generator().manual_seed(1))
    pet.set_delta(0.1 * start, seed=5)
    optimiser = torch.optim.SGD(pet.parameter_groups().values(), lr=1e-3)
    for _ in range(2):
        pet.zero_grad()
        logits = pet.model(**inputs).logits
        logits.square().sum().backward()
        optimiser.step()
        pet.after_step()
    groups = pet.parameter_groups().values()
    gradients = torch.cat([group.grad.cpu() for group in groups if group.grad is not None])
    return logits.detach().cpu(), gradients, pet.get_delta()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_training_is_the_same_there(name: str, structure: str, device: str) -> None:
    expected = _trained(name, structure, torch.device("cpu"))
    with _on(device) as there:
        found = _trained(name, structure, there)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-5 * float(one.abs().max()))


def _at_once(name: str, structure: str, device: torch.device) -> Tensor:
    """Updates of clients that were trained at once, (clients, values)."""
    base = backbone(name)
    base.model.to(device)
    pet = PetModel(base, mask_of(base, 0.05), structure_of(base, structure), seed=3)
    generator, sizes = np.random.default_rng(0), (5, 2, 4)
    offsets = np.cumsum([0, *generator.integers(3, 9, size=sum(sizes))]).astype(np.int64)
    tokens = generator.integers(5, 60, size=offsets[-1]).astype(np.int32)
    rows = Rows(tokens, offsets, generator.integers(0, 2, size=sum(sizes)), None, pad_id=0)
    ends = np.cumsum(sizes)
    clients = [
        ClientWork(np.arange(end - size, end), int(end))
        for size, end in zip(sizes, ends, strict=True)
    ]
    start = generator.normal(0, 0.01, pet.num_values).astype(np.float32)
    cut = name == "bert"
    config = TrainingConfig(optimizer="sgd", learning_rate=0.01, batch_size=2, cls_only=cut)
    task = Task("classification", ("no", "yes"), "accuracy")
    found = train_at_once(pet, start, clients, rows, task, config)
    return torch.stack([torch.from_numpy(c.update) for c in found if isinstance(c, TrainedClient)])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "structure"),
    [("bert", "lnfit+hiwi-bias+lora"), ("bert", "lora-factors"), ("llama", "lnfit+lora")],
)
def test_clients_at_once_end_there_where_they_end_here(
    name: str, structure: str, device: str
) -> None:
    expected = _at_once(name, structure, torch.device("cpu"))
    with _on(device) as there:
        found = _at_once(name, structure, there)
    assert len(found) == 3
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_the_mask_of_weights_that_lie_there_is_the_same(device: str) -> None:
    base = backbone("bert")
    config = MaskConfig(density=0.1, tiers=("0.01=0.5", "0.1=0.5"))
    expected = build_mask(maskable_weights(base.model, base.head), config)
    with _on(device) as there:
        base.model.to(there)
        found = build_mask(maskable_weights(base.model, base.head), config)
        assert found.digest() == expected.digest()
    assert found.tiers == expected.tiers


_WHOLE_RUNS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "cut passes, tiers, proximal term, adjusted logits": {
        "structure_preset": "lnfit+hiwi-bias",
        "mask_tiers": ["0.01=0.5", "0.05=0.5"],
        "training_cls_only": True,
        "strategy_name": "fedprox",
        "training_proximal_mu": 0.1,
        "training_logit_adjustment": 1.0,
        "training_matmul_backend": "onednn",
    },
    "a search on the clients": {
        "structure_preset": "none",
        "search_federated": True,
        "search_rounds": 1,
        "search_local_steps": 2,
        "strategy_num_rounds": 1,
        "search_budget": 200,
        "search_batch_size": 4,
    },
}


def _run_there(found: Any, device: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    with _on(device) as there:
        for name, module in [*sys.modules.items()]:  # whichever of them checks it
            if name.startswith("fedpet.") and "check_device" in vars(module):
                monkeypatch.setattr(module, "check_device", lambda _: str(there))
        return run(found)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("changes", _WHOLE_RUNS.values(), ids=_WHOLE_RUNS)
def test_a_whole_run_is_the_same_there(
    experiment: Any, changes: dict[str, Any], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, found = experiment(**changes), experiment(**changes)
    before = run(expected)
    after = _run_there(found, device, monkeypatch)
    assert after["refused"] == before["refused"] == []
    assert after["communication"]["messages"] == before["communication"]["messages"]
    close = 1e-5 if device == "second" else 2e-3  # AdamW makes steps of what is rounding
    one, other = (load_file(Path(e.run.out) / "model/model.safetensors") for e in (expected, found))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        np.testing.assert_allclose(other[name], tensor, atol=close, err_msg=name)


@pytest.mark.parametrize("device", DEVICES)
def test_updates_that_are_rotated_there_end_in_the_bits_of_those_rotated_here(
    experiment: Any, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"training_clients_at_once": 3, "codec_uplink": "dither-3", "strategy_num_rounds": 1}
    rotated: list[torch.device] = []

    def counted(updates: Tensor, *more: Any) -> bool:
        rotated.append(updates.device)
        return rotate_updates(updates, *more)

    monkeypatch.setattr(train_client, "rotate_updates", counted)
    there = _run_there(experiment(**changes), device, monkeypatch)
    assert {one.type for one in rotated} == {"meta" if device == "second" else device}
    monkeypatch.setattr(train_client, "rotate_updates", lambda *_: False)
    here = _run_there(experiment(**changes), device, monkeypatch)
    assert there["final_values_sha256"] == here["final_values_sha256"]


def test_the_second_device_refuses_what_a_gpu_refuses() -> None:
    with second_device() as there:
        moved = torch.ones(3).to(there)
        assert device_of(torch.nn.Linear(2, 2).to(there)) == moved.device == there
        assert (moved * 2.0 + torch.tensor(1.0)).cpu().tolist() == [3.0, 3.0, 3.0]
        with pytest.raises(RuntimeError, match="two devices"):
            moved + torch.ones(3)
        with pytest.raises((RuntimeError, TypeError)):
            moved.numpy()


# -- what cannot be ---------------------------------------------------------------------------


without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
NONE = "'cuda' needs a GPU .* sees none"


@without_gpu
def test_a_device_that_is_not_there_is_refused_in_a_sentence(experiment: Any) -> None:
    with pytest.raises(ConfigError, match=NONE):
        run(experiment(run_device="cuda"))


@without_gpu
def test_a_node_without_the_gpu_that_it_claims_is_refused_by_name(experiment: Any) -> None:
    settings = experiment()
    strong = replace(NodeConfig.from_experiment(settings), device="cuda")
    with pytest.raises(RunError, match="nothing was learned"):
        run(settings, LocalGrid.of(strong, 1))
    lines = (Path(settings.run.out) / "rounds.jsonl").read_text().splitlines()
    refused = [one["reason"] for line in lines for one in json.loads(line)["refused"]]
    assert len(refused) == 12
    assert all(re.search(NONE, reason) for reason in refused)


def test_other_names_are_refused(experiment: Any) -> None:
    with pytest.raises(ConfigError, match=r"run\.device must be .*cuda.*'tpu'"):
        experiment(run_device="tpu")
    with pytest.raises(ConfigError, match="one of cpu, cuda, got 'cuda:1'"):
        check_device("cuda:1")


def test_a_real_node_says_itself_that_it_has_a_gpu(experiment: Any) -> None:
    simulated = NodeConfig.from_experiment(experiment(run_device="cuda"))
    nodes = experiment(run_device="cuda", clients_partition="nodes")
    real = NodeConfig.from_experiment(nodes)
    assert (simulated.device, real.device) == ("cuda", "cpu")
    assert NodeConfig.from_experiment(nodes, {"device": "cuda"}).device == "cuda"


def test_workers_share_the_gpus_and_a_worker_has_one_at_most() -> None:
    assert [gpu_share(gpus, 8) for gpus in (1, 2, 3, 8, 9)] == [1 / 8, 1 / 4, 1 / 3, 1, 1]
    with pytest.raises(ConfigError, match="knows of no GPU"):
        gpu_share(0, 2)
