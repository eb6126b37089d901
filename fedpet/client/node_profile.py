"""What one device says of itself: the keys of a SuperNode's `--node-config`.

    ... -> plan -> [client] -> strategy -> ledger -> report

In:  Flower's node config, a flat table of scalars.
Out: a `Profile`, and where the node's rows, checkpoint and cache are.

    flower-supernode ... --node-config 'data="reviews.jsonl" client="device-7" threads=2'

    data            file or folder with the node's own rows, all of which are trained on
    client          the one client that holds them all; otherwise a column tells the clients apart:
    client-column   that column, where the experiment's clients.client-column is another
    split           which split of a folder; "train" unless named
    text-columns, label-column     of this file, where the experiment's are others
    backbone        the checkpoint's folder here, where it is not as the experiment names it
    cache           folder for tokenised rows and plans
    max-density     the largest tier of the mask that the device trains, see fedpet/pet/tiers.py
    threads         torch threads; results are the same to the bit at the same number only
    device          "cuda", where it has a GPU; untested as yet

A simulated node has none of these keys: its rows are the experiment's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedpet.config import BackboneConfig, ClientsConfig, DataConfig
from fedpet.errors import ConfigError

if TYPE_CHECKING:
    from fedpet.data import FederatedData

KEYS = {
    "data": str,
    "client": str,
    "client-column": str,
    "split": str,
    "text-columns": str,
    "label-column": str,
    "backbone": str,
    "cache": str,
    "threads": int,
    "device": str,
}
OTHERS = ("partition-id", "num-partitions", "max-density")  # Flower's simulation; fedpet.pet.tiers


@dataclass(frozen=True)
class Profile:
    """A device beyond an experiment's files.

    Attributes:
        has_own_rows: Its rows are its own, and all of them are trained on.
        client: The one client that holds them all, or "".
        threads: Of torch, or 0 for the plan's number.
    """

    has_own_rows: bool = False
    client: str = ""
    threads: int = 0

    def named(self, data: FederatedData) -> FederatedData:
        """The same rows, with the one client under the name it goes by in the federation."""
        if not self.client:
            return data
        clients = tuple(dataclasses.replace(one, id=self.client) for one in data.clients)
        return dataclasses.replace(data, clients=clients)


SIMULATED = Profile()


def read_node_config(node_config: Mapping[str, Any]) -> dict[str, Any]:
    """Check a node's config: known keys, of their types.

    Returns:
        What was given, by key; keys that others read are left out.

    Raises:
        ConfigError: With the key, what stands there, and what should.
    """
    given: dict[str, Any] = {}
    for key, value in node_config.items():
        if key in OTHERS:
            continue
        if key not in KEYS:
            known = ", ".join(sorted((*KEYS, *OTHERS)))
            raise ConfigError(f"unknown key in --node-config: {key!r}. Known are: {known}.")
        if not isinstance(value, KEYS[key]) or isinstance(value, bool) or value in ("", 0):
            raise ConfigError(
                f"{key} in --node-config must be a {KEYS[key].__name__} that says something, got "
                f"{value!r}."
            )
        given[key] = value
    if given.get("threads", 1) < 1:
        raise ConfigError(f"threads in --node-config must be at least 1, got {given['threads']}.")
    if "client" in given and "client-column" in given:
        raise ConfigError(
            "--node-config names both a client and a client-column: the rows are one client's, or "
            "a column tells whose each is."
        )
    if "data" not in given and given.keys() & {"client", "client-column", "split"}:
        raise ConfigError("--node-config names a client or a split and no data: give the file.")
    return given


def own_data(data: DataConfig, given: Mapping[str, Any]) -> DataConfig:
    """Where the node's rows are."""
    if "data" not in given:
        return data
    changes: dict[str, Any] = {"source": given["data"]}
    if "split" in given:
        changes["train_split"] = given["split"]
    if "text-columns" in given:
        changes["text_columns"] = tuple(c.strip() for c in given["text-columns"].split(","))
    if "label-column" in given:
        changes["label_column"] = given["label-column"]
    return dataclasses.replace(data, **changes)


def own_population(population: ClientsConfig, given: Mapping[str, Any]) -> ClientsConfig:
    """How the node's rows fall into clients."""
    if "data" not in given:
        return population
    if "client" in given:
        return dataclasses.replace(population, partition="iid", num_clients=1)
    column = given.get("client-column", population.client_column)
    return dataclasses.replace(population, partition="column", client_column=column)


def own_backbone(backbone: BackboneConfig, given: Mapping[str, Any]) -> BackboneConfig:
    """Where the node's copy of the checkpoint is."""
    if "backbone" not in given:
        return backbone
    return dataclasses.replace(backbone, model=given["backbone"], revision="")
