"""Start Flower's simulation on Ray; no other module does.

`run_simulation` is deprecated upstream, and is today the one way that takes a remote Ray cluster
and an app with its settings inside; what the rest of fedpet sees of it is `simulate`. Ray is
started here and not by Flower, since Flower hangs for an hour where Ray does not come up.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any, TypeVar

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedpet.client.node import reply
from fedpet.client.node_config import NodeConfig
from fedpet.config import Experiment, StrategyConfig
from fedpet.errors import ConfigError, RunError
from fedpet.pet.structure import Structure
from fedpet.protocol.flower_compat.flower_simulation import (
    RESTARTS,
    MessageEvents,
    mixed_into_pool,
    prompt_messages,
    quiet_flower,
    ray_on_loopback,
)
from fedpet.protocol.ledger import SEARCH, Ledger
from fedpet.run.callbacks import Callback
from fedpet.run.central_search import locked_output, state_file, write_file
from fedpet.run.checkpoint_file import RunCheckpoint
from fedpet.run.cluster_node import ClusterNode
from fedpet.run.federate import federate
from fedpet.run.federated_search import make_client_pool, search_in_rounds
from fedpet.run.interrupts import Heeding, Terminated, stoppable
from fedpet.run.local_grid import LocalGrid
from fedpet.run.prepare import Prepared, PreparedSearch, is_deployed, prepare
from fedpet.run.ray_cluster import PREFIX, cluster_address, ray_folder
from fedpet.run.resume import check_journal, cut_short, is_cut_short, searched_structure
from fedpet.run.run_folder import RunFolder, locked_run_folder
from fedpet.server.reply_stream import PromptGrid
from fedpet.utils.extras import check_extra

Result = TypeVar("Result")


BACKENDS = ("ray", "in-process")


def simulate(
    experiment: Experiment,
    callback: Callback,
    *,
    backend: str = "ray",
    check: Callable[[Prepared | PreparedSearch], None] | None = None,
) -> tuple[dict[str, Any], RunFolder]:
    """Run an experiment on Ray. Bad input is found before Ray starts, and leaves no run folder.

    Args:
        experiment: What to run.
        callback: Is called at stages, rounds and the end.
        backend: "ray", or "in-process" for one node in this process.
        check: Is given what was prepared, and raises where that is not what was meant.

    Returns:
        What `result.json` holds, and the run folder.

    Raises:
        InputError: The experiment, the checkpoint or the data cannot be used.
        RunError: Ray does not start, nothing was learned, or the last rounds came to no average.
        Interrupted: It was stopped; the message says whether the folder can be resumed.
    """
    _refuse_nodes(experiment)
    _check_backend(backend)
    out: RunFolder | None = None

    def how_to_go_on() -> str:
        if out is None or not (out.path / "config.toml").exists():
            return "No round had begun and nothing is left of it: start it again."
        return _resume_sentence(out.path)

    with stoppable(how_to_go_on), locked_run_folder(experiment) as out:  # noqa: F811 - known from here on
        prepared = prepare(experiment, callback)
        if check is not None:
            check(prepared)
        return _simulate(prepared, out, callback, backend), out


def resume(
    run: Path,
    callback: Callback,
    *,
    backend: str = "ray",
    strategy: StrategyConfig | None = None,
) -> tuple[dict[str, Any], RunFolder]:
    """Go on with a run that was cut short, from the last round that its journal holds.

    Args:
        run: Its folder.
        callback: Is called at stages, rounds and the end.
        backend: As in `simulate`.
        strategy: Of a run whose strategy is a class of the user's own.

    Returns:
        What `result.json` holds, the same as of a run that was never cut short, and the folder.

    Raises:
        InputError: The folder holds no such run, or the checkpoint, the rows, the settings or the
            packages are not those that it began with.
        RunError: Ray does not start, nothing was learned, or the last rounds came to no average.
        Interrupted: It was stopped once more.
    """
    _check_backend(backend)
    with stoppable(lambda: _resume_sentence(run)), cut_short(run, strategy) as experiment:
        prepared = prepare(experiment, callback, structure=searched_structure(run))
        journal = check_journal(run, prepared)
        done, kind = (0, "") if journal is None else (journal.server_round, journal.kind)
        if kind == SEARCH:
            callback.on_stage(f"resuming {run} after round {done} of its search")
        else:
            callback.on_stage(
                f"resuming {run} after round {done} of {experiment.strategy.num_rounds}"
            )
        out = RunFolder(run)
        return _simulate(prepared, out, callback, backend, journal), out


def search(experiment: Experiment, out: Path, callback: Callback) -> Structure:
    """Search a structure on the clients of an experiment on Ray, and train nothing.

    While it goes on its state lies beside the file, in the folder FILE.state: the same command goes
    on from there. In the end its rounds stay as FILE.rounds.jsonl.

    Args:
        experiment: As of a run; `search.federated` is taken as set.
        out: The structure's file to make.
        callback: Is called at stages and rounds.

    Raises:
        InputError: The experiment, the checkpoint, the budget or the data cannot be used, or `out`
            is there.
        RunError: Ray does not start, or the last rounds came to no average.
        Interrupted: It was stopped.
    """
    experiment = replace(experiment, search=replace(experiment.search, federated=True))
    _refuse_nodes(experiment)
    with locked_output(out):
        return _search(experiment, out, callback)


def _search(experiment: Experiment, out: Path, callback: Callback) -> Structure:
    folder = RunFolder(state_file(out))
    if folder.path.is_file():
        raise ConfigError(
            f"{str(folder.path)!r} is the state of a central search: remove it, or name another "
            "file with --out."
        )
    _check_ray()
    with stoppable(lambda: "The same command goes on from the last round."):
        prepared = prepare(experiment, callback)
        assert isinstance(prepared, PreparedSearch)
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"the folder {str(folder.path)!r} cannot be made: {error}.") from None
        with _no_empty_folder(folder.path):
            structure = _search_on_ray(prepared, folder, callback)
    rounds = folder.path / "rounds.jsonl"
    shutil.copyfile(rounds, out.with_name(out.name + ".rounds.jsonl"))
    write_file(out, structure.to_json())  # the last: with it the search is over
    shutil.rmtree(folder.path, ignore_errors=True)
    return structure


def _search_on_ray(prepared: PreparedSearch, folder: RunFolder, callback: Callback) -> Structure:
    experiment = prepared.experiment
    journal = check_journal(folder.path, prepared)
    if journal is not None:
        callback.on_stage(f"going on after round {journal.server_round}")

    def serve(grid: Grid) -> Structure:
        ledger = Ledger.reopen(
            folder.path / "rounds.jsonl", 0 if journal is None else journal.ledger_bytes
        )
        clients = make_client_pool(prepared)
        return search_in_rounds(grid, prepared, clients, ledger, folder, callback, journal)

    callback.on_stage(f"starting Ray with {experiment.run.workers} workers")
    return run_on_ray(experiment, lambda: _client_app(prepared), serve)


def _refuse_nodes(experiment: Experiment) -> None:
    if is_deployed(experiment):
        raise ConfigError(
            'clients.partition is "nodes": real nodes bring their clients, and a simulation has '
            "none. Name another partition, or run it on nodes (`fedpet deploy`)."
        )


def _resume_sentence(run: Path) -> str:
    if is_cut_short(run):
        return f"Go on with it: fedpet simulate --resume {quote(str(run))}"
    return f"The run was over by then, and lies in {quote(str(run))}."


def _check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ConfigError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}.")
    if backend == "ray":
        _check_ray()


def _check_ray() -> None:
    """Find out first, and in seconds, whether Ray could not start."""
    check_extra("ray", "simulation", "a simulation on Ray")
    if cluster_address() is None:
        ray_folder()


@contextmanager
def _no_empty_folder(path: Path) -> Iterator[None]:
    """Take the folder away again where what is inside failed before it wrote anything."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            path.rmdir()
        raise


def _simulate(
    prepared: Prepared | PreparedSearch,
    out: RunFolder,
    callback: Callback,
    backend: str,
    journal: RunCheckpoint | None = None,
) -> dict[str, Any]:
    experiment = prepared.experiment
    if backend == "in-process":
        with quiet_flower(), threads_as_before():
            grid = LocalGrid.of(NodeConfig.simulated(experiment), 1)
            return federate(Heeding(grid), prepared, out, callback, journal)
    callback.on_stage(f"starting Ray with {experiment.run.workers} workers")
    return run_on_ray(
        experiment,
        lambda: _client_app(prepared),
        lambda grid: federate(grid, prepared, out, callback, journal),
    )


def _client_app(prepared: Prepared | PreparedSearch) -> ClientApp:
    """Make the app of the nodes, once Ray runs."""
    settings = _settings(prepared)
    client_app = ClientApp()

    @client_app.train()
    def train(message: Message, context: Context) -> Message:
        return reply(message, settings())

    @client_app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return reply(message, settings())

    return client_app


def _settings(prepared: Prepared | PreparedSearch) -> Callable[[], NodeConfig]:
    if cluster_address() is not None:
        node = ClusterNode.of(prepared.experiment, prepared.data)
        node.check_machines()
        return node.here
    settings = NodeConfig.simulated(prepared.experiment)
    return lambda: settings


def run_on_ray(
    experiment: Experiment,
    make_client_app: Callable[[], ClientApp],
    serve: Callable[[Grid], Result],
) -> Result:
    """Run a server function against as many nodes as there are workers.

    Args:
        experiment: Says how many workers, of how many threads, on what device.
        make_client_app: Makes the nodes' app, once Ray runs.
        serve: Is given the Grid.
    """
    from flwr.simulation import run_simulation

    from fedpet.run.worker_pool import WorkerPool  # imports Ray

    server_app, events = ServerApp(), MessageEvents()
    results: list[Result] = []

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        results.append(serve(Heeding(PromptGrid(grid, events))))

    threads = experiment.training.threads
    workers = experiment.run.workers
    with (
        ray_runtime(num_cpus=workers * threads) as gpus,
        quiet_flower(),
        mixed_into_pool(WorkerPool, workers),
        prompt_messages(events),
    ):
        share = gpu_share(gpus, workers) if experiment.run.device == "cuda" else 0.0
        run_simulation(
            server_app,
            make_client_app(),
            num_supernodes=workers,
            backend_config={
                "client_resources": {"num_cpus": threads, "num_gpus": share, **RESTARTS}
            },
        )
    if not results:
        raise RunError("the simulation ended before its server did.")
    return results[0]


def gpu_share(gpus: float, workers: int) -> float:
    """Return each worker's share of a GPU: a whole one at most.

    Raises:
        ConfigError: There is no GPU.
    """
    if gpus < 1:
        raise ConfigError(
            "run.device is 'cuda', and Ray knows of no GPU: start it where there is one, or take "
            "'cpu'."
        )
    return 1.0 / math.ceil(workers / int(gpus))


@contextmanager
def ray_runtime(num_cpus: int) -> Iterator[float]:
    """Start Ray in a folder of its own, or join the cluster that RAY_ADDRESS names.

    Yields:
        How many GPUs it knows of.
    """
    import ray

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's default to come
    environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "TOKENIZERS_PARALLELISM": "false",
    }
    options: dict[str, Any] = {
        "include_dashboard": False,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "runtime_env": {"env_vars": environment},
    }
    folder = None
    place: AbstractContextManager[None] = ray_on_loopback()
    if address := cluster_address():
        options["address"], place = address, nullcontext()
    else:
        if cache := os.environ.get("FEDPET_CACHE"):  # else each machine's own
            environment["FEDPET_CACHE"] = cache
        folder = tempfile.mkdtemp(prefix=PREFIX, dir=ray_folder())
        # "local" stands above what RAY_ADDRESS says: nothing, or the same.
        options |= {"address": "local", "num_cpus": num_cpus, "_temp_dir": folder}
    terminate = signal.getsignal(signal.SIGTERM)
    try:
        try:
            with place:
                ray.init(**options)
        except SystemExit:  # so Ray takes a SIGTERM while it starts
            raise Terminated from None
        except Exception as error:  # Ray raises its own kinds, and plain ones
            raise RunError(f"Ray did not start: {' '.join(str(error).split())[:300]}") from None
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, terminate)  # Ray has put its own in its place
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        yield resources.get("GPU", 0.0)
    finally:
        ray.shutdown()
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def threads_as_before() -> Iterator[None]:
    """Set torch's threads of this process back: nodes and server each take their number."""
    import torch

    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
