"""Choose a mask by the gradient of one batch, which a server with labelled rows could take.

A control beside the rules that look at magnitudes alone (SNIP's idea, arXiv:1810.02340, without the
weight). Positions are not a function of the checkpoint, so they travel in the plan.
"""

from __future__ import annotations

import numpy as np
import torch

from fedpet.backbone.module_roles import maskable_weights
from fedpet.backbone.pretrained import Backbone
from fedpet.data import FederatedData
from fedpet.pet.mask import Mask, mask_size
from fedpet.training.batching import inputs_of
from fedpet.training.loss import client_loss
from fedpet.utils.seeds import derive_seed

__all__ = ["gradient_mask"]

BATCHES, BATCH_ROWS = 8, 32


def gradient_mask(backbone: Backbone, data: FederatedData, density: float, seed: int) -> Mask:
    """Choose the entries with the largest gradient of the mean loss over 256 training rows.

    Args:
        backbone: At the checkpoint, its head at its start. It is left frozen, as it came.
        data: Rows, of which fewer than 256 may be there.
        density: Fraction of the entries in scope, over all tensors together.
        seed: Of the rows that are drawn.

    Returns:
        The mask; ties go to the earlier entry in the order of the names.
    """
    scope = sorted(maskable_weights(backbone.model, backbone.head))
    weights = [backbone.model.get_parameter(name) for name in scope]
    rows = np.concatenate([client.rows for client in data.clients])
    drawn = np.random.default_rng(derive_seed("gradient mask", seed)).permutation(rows)
    labels = data.train.labels[rows]
    device = weights[0].device
    loss_of = client_loss(labels, data.task, 0.0, device, "")
    for weight in weights:
        weight.requires_grad_(True)
    try:
        for start in range(0, min(BATCHES * BATCH_ROWS, len(drawn)), BATCH_ROWS):
            inputs, answers = inputs_of(data.train, drawn[start : start + BATCH_ROWS], device)
            loss_of(backbone.model, inputs, answers).backward()
        scores = [-weight.grad.abs().flatten() for weight in weights if weight.grad is not None]
    finally:
        for weight in weights:
            weight.requires_grad_(False)
            weight.grad = None
    sizes = {name: len(score) for name, score in zip(scope, scores, strict=True)}
    flat = torch.cat(scores)  # (N,), the largest gradient lowest
    chosen = torch.sort(flat, stable=True).indices[: mask_size(density, len(flat))]
    positions, first = {}, 0
    for name, size in sizes.items():
        inside = chosen[(chosen >= first) & (chosen < first + size)] - first
        if len(inside):
            positions[name] = inside.cpu()
        first += size
    return Mask(positions, sizes)
