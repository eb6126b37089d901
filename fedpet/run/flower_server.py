"""Serve a run of Flower's own: `flwr run`, simulated or on real nodes.

In:  the app's run config, which is the experiment, flat.
Out: a run folder.

Where `run.out` names the folder of a run that was cut short, that run is gone on with.
"""

from contextlib import ExitStack
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid

from fedpet.client.node_config import script_in_app
from fedpet.config import Experiment
from fedpet.errors import ConfigError
from fedpet.run.federate import federate
from fedpet.run.prepare import is_deployed, prepare
from fedpet.run.progress import Progress
from fedpet.run.resume import check_journal, cut_short, is_cut_short, searched_structure
from fedpet.run.run_folder import RunFolder, locked_run_folder
from fedpet.run.trackers import callbacks_of
from fedpet.utils.paths import expand

__all__ = ["serve_run"]


def serve_run(grid: Grid, context: Context, app: Path | None = None) -> None:
    """Run the federation and leave a run folder.

    Args:
        grid: Leads to the nodes.
        context: Of the run.
        app: The app's folder, from which a relative `clients-script` leads where it holds the file.

    Raises:
        ConfigError: The run config is no experiment, or names a relative path.
        RunError: Nothing was learned.
    """
    experiment = script_in_app(Experiment.from_run_config(context.run_config), app)
    if experiment.clients.script and is_deployed(experiment):
        raise ConfigError(
            "clients.script is run by a simulation, and a deployment's nodes name their own "
            "(`fedpet deploy ... --script FILE`): leave it out of the run config."
        )
    refuse_relative(experiment)
    folder = expand(experiment.run.out)
    goes_on = bool(experiment.run.out) and is_cut_short(folder)
    with ExitStack() as held:
        if goes_on:
            experiment = held.enter_context(cut_short(folder))
            out = RunFolder(folder)
        else:
            out = held.enter_context(locked_run_folder(experiment))
        progress = held.enter_context(Progress.of(experiment))
        callbacks = callbacks_of([progress, *experiment.run.callbacks])
        progress.on_stage(f"run folder: {out.path.absolute()}")
        prepared = prepare(
            experiment, callbacks, structure=searched_structure(folder) if goes_on else None
        )
        journal = check_journal(folder, prepared) if goes_on else None
        result = federate(grid, prepared, out, callbacks, journal)
        for warning in result["quality"]["warnings"]:
            progress.on_stage(f"warning: {warning}")


def refuse_relative(experiment: Experiment) -> None:
    """Refuse paths that the place where Flower's server was once started would give a meaning.

    A server on the user's own machine stays after `flwr run`, and with it its directory and its
    environment: another run from another folder would be given the first one's files. In a
    deployment, each machine's scripts start in their own folder, and paths are relative to that.

    Raises:
        ConfigError: A path is relative.
    """
    if is_deployed(experiment):
        return
    for key, value in experiment.relative_paths():
        raise ConfigError(
            f"{key.replace('.', '-')} in the run config must be an absolute path, got {value!r}: "
            "Flower's server keeps the directory in which it was started first, "
            f"{str(Path.cwd())!r}, so a relative path may lead to another folder than yours."
        )
