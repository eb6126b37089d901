"""`fedpet search`: an experiment's training rows in, a structure's file out.

In:  an experiment; its clients play no part, all training rows are searched on together.
Out: `structure.json`, which `structure.file` takes in any experiment of the same backbone.

While a search goes on its state lies beside the file, as FILE.state: the same command goes on from
there and ends with the same bytes. Nothing in the file depends on when or how fast it was made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedpet.backbone.device import check_device
from fedpet.backbone.module_roles import maskable_weights
from fedpet.backbone.pretrained import Backbone, load_for_task, locate
from fedpet.client.node_config import make_cache
from fedpet.codec.spec import parse_codec
from fedpet.config import ClientEvaluation, ClientsConfig, Experiment, MaskConfig, SearchConfig
from fedpet.data import FederatedData, load_data
from fedpet.errors import ConfigError
from fedpet.pet.kernels.matmul_timing import settle_product
from fedpet.pet.mask import Mask, build_mask
from fedpet.pet.structure import PRESETS, Structure
from fedpet.run.callbacks import Callback
from fedpet.run.run_folder import versions
from fedpet.search import (
    manual_structure,
    random_structure,
    repeat_file,
    resolve_settings,
    run_search,
    space_for,
)
from fedpet.training.input_checks import check_inputs
from fedpet.utils.atomic_write import atomic_write
from fedpet.utils.lock import LOCK_FILE, locked, made_folder

if TYPE_CHECKING:
    from collections.abc import Mapping

_EVERYBODY = ClientsConfig(partition="iid", num_clients=1, min_rows=1)


def search_centrally(experiment: Experiment, out: Path, callback: Callback) -> Structure:
    """Find the structure that `experiment.search` asks for, and leave its file.

    Args:
        experiment: Its backbone, data, mask, rates and search are read.
        out: The file to make.
        callback: Is called at stages and steps.

    Raises:
        InputError: The experiment, the budget or the data cannot be used, or `out` is there.
    """
    with locked_output(out):
        return _search(experiment, out, callback)


def _search(experiment: Experiment, out: Path, callback: Callback) -> Structure:
    device = check_device(experiment.run.device)
    callback.on_stage("reading and tokenising the rows")
    rule = ClientEvaluation.of(experiment.clients)
    # Of rows whose clients do not matter: none of them keeps any from training.
    whole = experiment.search.split == "rows" and rule is None
    data = load_data(
        experiment.data,
        _EVERYBODY if whole else experiment.clients,
        locate(experiment.backbone),
        cache=make_cache(experiment),
        evaluation=False,
        on_rows=callback.on_rows,
    )
    if rule is not None:
        seen = tuple(client for client in data.clients if not rule.is_unseen(client.id))
        data = replace(data, clients=seen)
    callback.on_stage(f"loading the backbone {experiment.backbone.model!r}")
    backbone = load_for_task(experiment.backbone, data.task, device=device)
    check_inputs(backbone.model, data.train, experiment.data.max_length)
    for line in backbone.origin.lines():
        callback.on_stage(line)
    mask = mask_beside(experiment, backbone)
    config = resolve_search(experiment, backbone, mask)
    training = settle_product(experiment.training, backbone.model, make_cache(experiment))
    origin = origin_of(experiment, rows=len(data.train), masked=experiment.mask.enabled)
    structure = find_structure(
        backbone,
        data,
        config,
        indices=None if whole else np.concatenate([client.rows for client in data.clients]),
        mask=mask,
        mask_config=experiment.mask,
        logit_adjustment=experiment.training.logit_adjustment,
        loss=experiment.training.loss,
        products=training.matmul_backend,
        state=state_file(out),
        origin=origin,
        callback=callback,
    )
    write_file(out, structure.to_json())
    for repeat in range(config.repeats):
        state = repeat_file(state_file(out), repeat)
        assert state is not None
        state.unlink(missing_ok=True)
    return structure


def mask_beside(experiment: Experiment, backbone: Backbone) -> Mask | None:
    """Build the mask that is trained beside a search's candidates, where it is none of them.

    Raises:
        ConfigError: The mask is to be searched, and mask.enabled is false, or it has tiers.
    """
    masked = experiment.mask
    if experiment.search.space == "joint":
        if not masked.enabled or masked.tiers:
            raise ConfigError(
                'search.space = "joint" searches the mask too: it needs mask.enabled = true and '
                "mask.tiers = []. Set both, or take another space."
            )
        return None
    if not masked.enabled:
        return None
    return build_mask(maskable_weights(backbone.model, backbone.head), masked)


def resolve_search(experiment: Experiment, backbone: Backbone, mask: Mask | None) -> SearchConfig:
    """Return the experiment's search with its rates, and its budget in values.

    Raises:
        InputError: The budget does not read, or the mask fills it.
    """
    budget = str(experiment.search.budget).strip()
    in_bytes = budget[-1:].isalpha()
    return resolve_settings(
        experiment.search,
        experiment.training,
        backbone_parameters=backbone.pretrained_parameters,
        bytes_per_value=bytes_per_value(experiment.codec.uplink) if in_bytes else 4.0,
        mask_values=mask.num_values if mask is not None else 0,
    )


def origin_of(experiment: Experiment, *, rows: int, masked: bool) -> dict[str, Any]:
    """Return the provenance of a structure: experiment, backbone, data, mask, versions."""
    return {
        "experiment": experiment.run.name,
        "backbone": experiment.backbone.model,
        "data": {
            "source": experiment.data.source,
            "split": experiment.data.train_split,
            "rows": rows,
        },
        "mask": asdict(experiment.mask) if masked else None,
        "asked_budget": experiment.search.budget,
        "mask_in_budget": masked and experiment.search.mask_in_budget,
        "versions": {name: versions()[name] for name in ("fedpet", "torch", "transformers")},
    }


def find_structure(
    backbone: Backbone,
    data: FederatedData,
    config: SearchConfig,
    *,
    mask: Mask | None = None,
    mask_config: MaskConfig | None = None,
    logit_adjustment: float = 0.0,
    loss: str = "",
    products: str = "torch",
    indices: np.ndarray | None = None,
    state: Path | None = None,
    origin: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
) -> Structure:
    """Find a structure by `config.method`: searched, random, or manual.

    Args:
        logit_adjustment: Of a search's losses, as in training.
        loss: Of a search, as in training.
        products: Of its dense layers, as in training.
        indices: Of the training rows; None takes all.
        origin: What else the structure says about where it came from.

    Raises:
        ConfigError: There is no such method.
    """
    model, head, origin = backbone.model, backbone.head, dict(origin or {})
    if config.method == "s3pet":
        return run_search(
            backbone,
            data.train,
            np.arange(len(data.train)) if indices is None else indices,
            data.task,
            config,
            owners=owners_of(data, indices) if config.split == "clients" else None,
            mask=mask,
            mask_config=mask_config,
            logit_adjustment=logit_adjustment,
            loss=loss,
            products=products,
            state_file=state,
            progress=None if callback is None else callback.on_search_step,
            provenance=origin,
        ).structure
    budget, rank, scale = float(config.budget), config.rank, config.scale
    if config.method == "random":
        space = space_for(config, model, mask_config, head=head)
        structure = random_structure(
            space, budget, seed=config.seed, fingerprint=backbone.fingerprint
        )
    else:
        if not set(map(str.strip, config.method.split("+"))) <= set(PRESETS):
            raise ConfigError(
                f"search.method must be s3pet, random, or presets joined by '+' (of "
                f"{', '.join(PRESETS)}), got {config.method!r}."
            )
        structure = manual_structure(
            model,
            config.method,
            budget,
            head=head,
            rank=rank,
            scale=scale,
            fingerprint=backbone.fingerprint,
        )
    return replace(structure, provenance={**structure.provenance, **origin})


def owners_of(data: FederatedData, indices: np.ndarray | None) -> np.ndarray:
    """Return the number of each row's client, -1 of rows without one: int64, (n,).

    Args:
        data: Rows and clients.
        indices: The rows to tell of; None takes all.
    """
    owners = np.full(len(data.train), -1, dtype=np.int64)
    for number, client in enumerate(data.clients):
        owners[client.rows] = number
    return owners if indices is None else owners[indices]


def bytes_per_value(codec: str) -> float:
    """Return a codec's bytes a value before its entropy stage, without scales and framing."""
    parsed = parse_codec(codec)
    if parsed.topk_ppm:
        raise ConfigError(
            f"a budget in bytes needs a codec that sends every value, got "
            f"codec.uplink = {codec!r}. Give search.budget as a number of values, or as a fraction."
        )
    return parsed.bits / 8


def state_file(out: Path) -> Path:
    """Return the file of the state of a search that makes `out`."""
    return out.with_name(out.name + ".state")


@contextmanager
def locked_output(out: Path) -> Iterator[None]:
    """Lock the search that makes `out`, in a folder that is made for it where it is absent.

    Raises:
        ConfigError: `out` is there, another process makes it, or it cannot be written.
    """
    with made_folder(out.parent), locked(out.with_name(f".{out.name}{LOCK_FILE}"), out):
        if out.exists():
            raise ConfigError(f"the file {str(out)!r} is there already: name another with --out.")
        yield


def write_file(path: Path, text: str) -> None:
    """Leave a file, whole or not at all.

    Raises:
        ConfigError: It cannot be written.
    """
    try:
        atomic_write(path, text.encode())
    except OSError as error:
        raise ConfigError(f"the file {str(path)!r} cannot be written: {error}.") from None
