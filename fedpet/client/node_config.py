"""Configure a node: its checkpoint, rows, cache and device; everything else comes with the plan.

In:  an experiment, and Flower's node config, a flat table of scalars:

    flower-supernode ... --node-config 'data="reviews.jsonl" client="device-7" threads=2'

    data            file or folder with the node's own rows, all of which are trained on
    client          the one client that holds them all; else a column names each row's client:
    client-column   that column, where the experiment's population.client-column is another
    split           which split of a folder; "train" unless named
    text-columns, label-column     of this file, where the experiment's are others
    backbone        the checkpoint's folder here, where it is not as the experiment names it
    cache           folder for tokenised rows and plans
    max-density     the largest tier of the mask that the device trains, see fedpet/pet/tiers.py
    threads         torch threads; results are the same to the bit at the same number only
    device          "cuda", where it has a GPU
    max-...         what a plan may ask of the device, see fedpet/client/node_limits.py

Out: a `NodeConfig`. A simulated node has none of these keys: its rows are the experiment's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpet.client.node_limits import LIMIT_KEYS, NodeLimits
from fedpet.config import BackboneConfig, ClientsConfig, DataConfig, Experiment
from fedpet.errors import AbsentDataError, ConfigError
from fedpet.protocol.plan import Plan
from fedpet.utils.paths import absolute, cache_root, expand

if TYPE_CHECKING:
    from fedpet.data import FederatedData

__all__ = ["NodeConfig", "cache_folder", "make_cache", "refuse_script", "script_in_app"]

_KEYS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("data", "client", "client-column", "split", "text-columns"), str),
    **dict.fromkeys(("label-column", "backbone", "cache", "device"), str),
    **dict.fromkeys(("threads", *LIMIT_KEYS), int),
    "max-density": (int, float),
}
_FLOWER_KEYS = ("partition-id", "num-partitions")  # of Flower's simulation


@dataclass(frozen=True, kw_only=True)
class NodeConfig:
    """The configuration of a node.

    Attributes:
        backbone: The node's own copy of the checkpoint.
        data: The source of its rows.
        population: The partition of its rows into clients.
        cache: Folder for tokenised rows and plans.
        device: The device of its models, see fedpet/backbone/device.py.
        max_density: It trains the largest tier of the mask up to this density; None leaves it to
            the server, which draws a tier for each client.
        has_own_rows: Its rows are its own, and all of them are trained on.
        client: The one client that holds them all, or "".
        threads: Of torch, or 0 for the plan's number.
        load_rows: Returns its rows, tokenised already; None reads `data`.
        limits: What a plan may ask of it; None, of a simulated node, takes any.
        own_cache: Nobody else uses its cache: what was made of rows that are gone goes too.
        script: A script of this machine whose Trainer trains its clients, see
            fedpet/client/trainer_script.py; None trains by fedpet's own loop.
    """

    backbone: BackboneConfig
    data: DataConfig
    population: ClientsConfig
    cache: Path
    device: str = "cpu"
    max_density: float | None = None
    has_own_rows: bool = False
    client: str = ""
    threads: int = 0
    load_rows: Callable[[], FederatedData] | None = None
    limits: NodeLimits | None = None
    own_cache: bool = False
    script: Path | None = None

    @property
    def disk_bytes(self) -> int:
        """Most bytes of plans and state on its disk; 0 sets no bound."""
        return 0 if self.limits is None else self.limits.disk_bytes

    def read_plan(self, data: bytes) -> Plan:
        """Read a plan, within the limits.

        Raises:
            PlanError: It is no plan, or beyond a limit.
        """
        return Plan.from_bytes(data) if self.limits is None else self.limits.read_plan(data)

    @classmethod
    def from_experiment(
        cls, experiment: Experiment, node_config: Mapping[str, Any] | None = None
    ) -> NodeConfig:
        """Configure a node that has the experiment's files.

        Args:
            experiment: Names backbone, data and cache.
            node_config: Flower's `--node-config`; it stands above the experiment.

        Raises:
            ConfigError: An unknown key, or a value that cannot be.
        """
        given = _read(node_config or {})
        # A simulated node's device is the experiment's; a real one has a GPU if it says so.
        is_real = experiment.clients.partition == "nodes"
        return cls(
            backbone=_backbone(experiment.backbone, given),
            data=_data(experiment.data, given),
            population=_population(experiment.clients, given),
            cache=absolute(given["cache"]) if "cache" in given else cache_folder(experiment),
            device=given.get("device", "cpu" if is_real else experiment.run.device),
            max_density=float(given["max-density"]) if "max-density" in given else None,
            has_own_rows="data" in given,
            client=given.get("client", ""),
            threads=given.get("threads", 0),
            limits=NodeLimits.from_node_config(given) if "data" in given else None,
            own_cache="data" in given and "cache" in given,
        )

    @classmethod
    def simulated(cls, experiment: Experiment) -> NodeConfig:
        """Configure a simulated node, which alone heeds `clients.script`."""
        script = experiment.clients.script
        config = cls.from_experiment(experiment)
        return replace(config, script=absolute(script) if script else None)


def script_in_app(experiment: Experiment, app: Path | None) -> Experiment:
    """Return a simulation's settings, a relative `clients.script` led to its file in an app.

    Args:
        experiment: The settings.
        app: The Flower app's folder; None, or one without that file, leaves them as they are.
    """
    script = experiment.clients.script
    if not script or app is None or not (app / expand(script)).is_file():
        return experiment
    clients = replace(experiment.clients, script=str(absolute(app / expand(script))))
    return replace(experiment, clients=clients)


def refuse_script(experiment: Experiment) -> None:
    """Refuse a run whose server names a script: a node runs none but its owner's.

    Raises:
        ConfigError: `clients.script` is not "".
    """
    if experiment.clients.script:
        raise ConfigError(
            "clients.script is run by a simulation, `fedpet simulate` or `flwr run`, and this is a "
            "real node, which runs no script that a server names: leave it out of the run config, "
            "and name the node's own with `fedpet deploy ... --script FILE`."
        )


def cache_folder(experiment: Experiment) -> Path:
    """Return the folder of tokenised rows and plans."""
    return cache_root(experiment.run.cache)


def make_cache(experiment: Experiment) -> Path:
    """Return the same folder, made where it is absent.

    Raises:
        AbsentDataError: It cannot be made.
    """
    folder = cache_folder(experiment)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror
        raise AbsentDataError(
            f"the cache {str(folder)!r} cannot be made: {reason}. Name a folder that can be, by "
            "run.cache or $FEDPET_CACHE."
        ) from None
    return folder


def _read(node_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a node config that are not Flower's, each checked."""
    given = {key: value for key, value in node_config.items() if key not in _FLOWER_KEYS}
    for key, value in given.items():
        if key not in _KEYS:
            known = ", ".join(sorted((*_KEYS, *_FLOWER_KEYS)))
            raise ConfigError(f"unknown key in --node-config: {key!r}. Known are: {known}.")
        fits = isinstance(value, _KEYS[key]) and not isinstance(value, bool)
        if key == "max-density":
            if not (fits and 0 < value <= 1):
                raise ConfigError(
                    f"a node's max-density must be in (0, 1], got {value!r}. It is the largest "
                    "fraction of the entries in scope that the device trains."
                )
        elif not fits or value in ("", 0):
            name = "int" if _KEYS[key] is int else "str"
            raise ConfigError(
                f"{key} in --node-config must be a {name} that says something, got {value!r}."
            )
    for key in ("threads", *LIMIT_KEYS):
        if given.get(key, 1) < 1:
            raise ConfigError(f"{key} in --node-config must be at least 1, got {given[key]}.")
    if "client" in given and "client-column" in given:
        raise ConfigError(
            "--node-config names both a client and a client-column: the rows are one client's, or "
            "a column tells whose each is."
        )
    if "data" not in given and given.keys() & {"client", "client-column", "split"}:
        raise ConfigError("--node-config names a client or a split and no data: give the file.")
    return given


def _backbone(backbone: BackboneConfig, given: Mapping[str, Any]) -> BackboneConfig:
    if "backbone" not in given:
        return backbone
    return replace(backbone, model=given["backbone"], revision="")


def _data(data: DataConfig, given: Mapping[str, Any]) -> DataConfig:
    if "data" not in given:
        return data
    changes: dict[str, Any] = {"source": given["data"]}
    if "split" in given:
        changes["train_split"] = given["split"]
    if "text-columns" in given:
        changes["text_columns"] = tuple(c.strip() for c in given["text-columns"].split(","))
    if "label-column" in given:
        changes["label_column"] = given["label-column"]
    return replace(data, **changes)


def _population(population: ClientsConfig, given: Mapping[str, Any]) -> ClientsConfig:
    if "data" not in given:
        return population
    if "client" in given:
        return replace(population, partition="iid", num_clients=1)
    column = given.get("client-column", population.client_column)
    return replace(population, partition="column", client_column=column)
