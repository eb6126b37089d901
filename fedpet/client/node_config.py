"""What a node knows of itself: where its checkpoint and rows are, and how strong it is.

In:  an experiment's files, and what the node was started with (Flower's `--node-config`).
Out: `NodeSettings`; everything else comes with the plan (fedpet/protocol/plan.py).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedpet.client.node_profile import (
    SIMULATED,
    Profile,
    own_backbone,
    own_data,
    own_population,
    read_node_config,
)
from fedpet.config import BackboneConfig, ClientsConfig, DataConfig, Experiment
from fedpet.errors import ConfigError, DataError
from fedpet.utils.paths import absolute

__all__ = ["NodeSettings", "cache_folder", "make_cache"]


@dataclass(frozen=True, kw_only=True)
class NodeSettings:
    """What a node knows of itself; everything else comes with the plan.

    Attributes:
        profile: What the node was started with beyond an experiment's files.
        backbone: Where the node's own copy of the checkpoint is.
        data: Where its rows are.
        population: How its rows fall into clients.
        cache: Folder for tokenised rows and plans.
        device: Where its models lie, see fedpet/backbone/device.py.
        max_density: It trains the largest tier of the mask up to this density; None leaves it to
            the server, which draws a tier for each client.
    """

    profile: Profile = SIMULATED
    backbone: BackboneConfig
    data: DataConfig
    population: ClientsConfig
    cache: Path
    device: str = "cpu"
    max_density: float | None = None

    @classmethod
    def of(
        cls, experiment: Experiment, node_config: Mapping[str, object] | None = None
    ) -> NodeSettings:
        """The settings of a node that has the experiment's files.

        Args:
            experiment: Where backbone, data and cache are.
            node_config: What the node was started with (Flower's `--node-config`). Its key
                "max-density" is read, others are left alone.

        Raises:
            ConfigError: "max-density" is no density.
        """
        return cls(
            backbone=experiment.backbone,
            data=experiment.data,
            population=experiment.clients,
            cache=cache_folder(experiment),
            device=_device(experiment),
            max_density=_max_density(node_config or {}),
        )

    def on(self, node_config: Mapping[str, Any]) -> NodeSettings:
        """The settings of a node that was started with a config of its own
        (fedpet/client/node_profile.py).

        Raises:
            ConfigError: An unknown key, or a value that cannot be.
        """
        given = read_node_config(node_config)
        return replace(
            self,
            profile=Profile(
                has_own_rows="data" in given,
                client=given.get("client", ""),
                threads=given.get("threads", 0),
            ),
            backbone=own_backbone(self.backbone, given),
            data=own_data(self.data, given),
            population=own_population(self.population, given),
            cache=absolute(given["cache"]) if "cache" in given else self.cache,
            device=given.get("device", self.device),
        )


def cache_folder(experiment: Experiment) -> Path:
    """Where tokenised rows and plans are kept between runs."""
    return absolute(experiment.run.cache or os.environ.get("FEDPET_CACHE") or "~/.cache/fedpet")


def make_cache(experiment: Experiment) -> Path:
    """The same folder, made where it is absent.

    Raises:
        DataError: It cannot be made.
    """
    folder = cache_folder(experiment)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror
        raise DataError(
            f"the cache {str(folder)!r} cannot be made: {reason}. Name a folder that can be, by "
            "run.cache or $FEDPET_CACHE."
        ) from None
    return folder


def _device(experiment: Experiment) -> str:
    """A simulated node's is the experiment's; a real one says itself that it has a GPU."""
    return "cpu" if experiment.clients.partition == "nodes" else experiment.run.device


def _max_density(node_config: Mapping[str, object]) -> float | None:
    """What a node's own configuration says of its strength."""
    named = node_config.get("max-density")
    if named is None:
        return None
    if isinstance(named, bool) or not isinstance(named, int | float) or not 0 < named <= 1:
        raise ConfigError(
            f"a node's max-density must be in (0, 1], got {named!r}. It is the largest fraction of "
            "the entries in scope that the device trains."
        )
    return float(named)
