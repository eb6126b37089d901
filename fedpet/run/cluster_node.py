"""Give a worker on another machine of a Ray cluster the run's checkpoint and rows.

Rows travel tokenised through Ray's object store, where the workers of a machine share them. The
checkpoint is found by content: where the machine holds the same files under the same path, they are
read there; else they are fetched once, piece by piece, from the machine that the run was started
on, and kept in the cache of the worker's machine. That cache is no other machine's:
$FEDPET_CACHE as `ray start` had it, else ~/.cache/fedpet there; run.cache stands above both.
"""

from __future__ import annotations

import atexit
import fcntl
import functools
import hashlib
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedpet.backbone.checkpoint import locate, weight_files
from fedpet.client.node_config import NodeConfig
from fedpet.config import Experiment
from fedpet.data import FederatedData
from fedpet.data.collator import COLLATORS
from fedpet.data.content_folder import store_folder
from fedpet.data.rows import no_rows
from fedpet.errors import ConfigError, FedpetError, RunError
from fedpet.utils.paths import cache_root
from fedpet.utils.source_digest import check_source_digest, code_digest

__all__ = ["ClusterNode", "FileReader"]

PIECE_BYTES = 32 * 2**20


@dataclass(frozen=True)
class File:
    """A file of a checkpoint, by content."""

    name: str
    num_bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> File:
        """Hash a file."""
        with path.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        return cls(path.name, path.stat().st_size, digest)

    def is_at(self, path: Path) -> bool:
        """Return True if a path leads to the same content."""
        try:
            return path.stat().st_size == self.num_bytes and File.of(path) == self
        except OSError:
            return False


class FileReader:
    """Read pieces of a folder's files, for other machines; an actor of Ray."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def read(self, name: str, start: int) -> bytes:
        """Return at most `PIECE_BYTES` from a place on."""
        with (self._folder / name).open("rb") as file:
            file.seek(start)
            return file.read(PIECE_BYTES)


@dataclass(frozen=True)
class ClusterNode:
    """A node's configuration, to be completed on the worker's machine.

    Attributes:
        settings: Of a node on the machine that the run was started on.
        has_cache: The experiment names a cache, which stands on every machine.
        files: Of the checkpoint.
        reader: Handle of the `FileReader`.
        rows: Reference of the tokenised rows in Ray's object store.
        collator: Name of the user's own, or "".
        code: Digest of the run's fedpet.
        shared: A file of the cache that every machine must see; None where each may have its own.
    """

    settings: NodeConfig
    has_cache: bool
    files: tuple[File, ...]
    reader: Any = field(compare=False)
    rows: Any
    collator: str
    code: str
    shared: Path | None

    @classmethod
    def of(cls, experiment: Experiment, data: FederatedData) -> ClusterNode:
        """Offer checkpoint and rows to the cluster that this process has joined."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        folder = locate(experiment.backbone)
        wanted = {*folder.glob("*.json"), *weight_files(folder)}
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        reader = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(FileReader)
        settings = NodeConfig.simulated(experiment)
        return cls(
            settings=replace(settings, backbone=replace(settings.backbone, model=str(folder))),
            has_cache=bool(experiment.run.cache),
            files=tuple(File.of(path) for path in sorted(wanted)),
            reader=reader.options(scheduling_strategy=here).remote(str(folder)),
            rows=ray.put(
                replace(
                    data,
                    train=replace(data.train, collator=None),  # imported by name on the machine
                    evaluation=no_rows(replace(data.evaluation, collator=None)),
                )
            ),
            collator=experiment.data.collator,
            code=code_digest(),
            shared=_marker(settings.cache) if experiment.codec.error_feedback else None,
        )

    def check_machines(self) -> None:
        """Complete the configuration once on each machine that can have a worker.

        Raises:
            ConfigError: A machine cannot run the experiment; the message names it.
        """
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        check = ray.remote(num_cpus=0, max_retries=0)(_complaint)
        asked = {}
        for machine in ray.nodes():  # type: ignore[no-untyped-call]
            if machine["Alive"] and machine["Resources"].get("CPU", 0) >= 1:
                there = NodeAffinitySchedulingStrategy(machine["NodeID"], soft=False)
                answer = check.options(scheduling_strategy=there).remote(self)
                asked[answer] = f"{machine['NodeManagerHostname']} ({machine['NodeName']})"
        for answer, name in asked.items():
            try:
                complaint = ray.get(answer)
            except ray.exceptions.NodeDiedError:
                continue  # the others go on without it
            except ray.exceptions.RayError as error:
                complaint = " ".join(str(error).split())[-300:]
            if complaint:
                raise ConfigError(f"the machine {name} of the cluster: {complaint}")

    def here(self) -> NodeConfig:
        """Return the configuration of a node in this worker.

        Raises:
            ConfigError: This machine has another fedpet, or a cache of its own where it may not.
            RunError: The checkpoint's files changed since the run began.
            DataError: The cache here cannot be written.
        """
        return _complete(self)


def _complaint(node: ClusterNode) -> str:
    """Return what is wrong with this machine, or ""."""
    try:
        node.here()
    except FedpetError as error:
        return str(error)
    return ""


def _marker(cache: Path) -> Path:
    """Leave an empty file in the cache, which tells it from others."""
    cache.mkdir(parents=True, exist_ok=True)
    marker = cache / f".cluster-{uuid.uuid4().hex}"
    marker.touch()
    atexit.register(marker.unlink, missing_ok=True)
    return marker


@functools.lru_cache(maxsize=1)
def _complete(node: ClusterNode) -> NodeConfig:
    try:
        check_source_digest(node.code)
    except ConfigError:
        raise ConfigError("it has another fedpet than the run: install the same one.") from None
    cache = node.settings.cache
    if not node.has_cache:
        cache = cache_root()
    if node.shared is not None and not (cache / node.shared.name).exists():
        raise ConfigError(
            f"its cache {str(cache)!r} is its own, and codec.error-feedback keeps what a client "
            "lost of an update there, for whichever machine trains it next: name a folder that all "
            "machines share by run.cache, or leave codec.error-feedback out."
        )
    folder = Path(node.settings.backbone.model)
    if not all(file.is_at(folder / file.name) for file in node.files):
        folder = _fetch(node, cache / "checkpoints")
    return replace(
        node.settings,
        backbone=replace(node.settings.backbone, model=str(folder), revision=""),
        cache=cache,
        load_rows=functools.partial(_load_rows, node),
    )


def _load_rows(node: ClusterNode) -> FederatedData:
    import ray

    data: FederatedData = ray.get(node.rows)
    collator = COLLATORS.find(node.collator) if node.collator else None
    return replace(data, train=replace(data.train, collator=collator))


def _fetch(node: ClusterNode, root: Path) -> Path:
    """Fetch the checkpoint from the machine that the run was started on, unless it is here."""
    import ray

    def fill(folder: Path) -> None:
        for file in node.files:
            with (folder / file.name).open("wb") as copy:
                for start in range(0, file.num_bytes, PIECE_BYTES):
                    copy.write(ray.get(node.reader.read.remote(file.name, start)))
            if not file.is_at(folder / file.name):
                raise RunError(
                    f"the checkpoint's {file.name!r} is no longer the file that the run began "
                    "with: leave checkpoints alone while they are in use."
                )

    key = hashlib.sha256(repr(node.files).encode()).hexdigest()
    with _one_at_a_time(root, key):
        return store_folder(root, fill, key=key)


@contextmanager
def _one_at_a_time(root: Path, key: str) -> Iterator[None]:
    """Let the other workers of a machine wait for the first, which fetches for all."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / f".{key[:32]}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
