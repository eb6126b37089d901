"""The ServerApp of `flwr run`: the experiment is the app's run config.

Where `run.out` names the folder of a run that was cut short, that run is gone on with.
"""

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedpet.config import Experiment
from fedpet.simulations.federation import federate, prepare
from fedpet.simulations.progress import Progress
from fedpet.simulations.resume import (
    check_journal,
    found_before,
    is_cut_short,
    read_cut_short,
)
from fedpet.simulations.run_folder import RunFolder, new_run_folder

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation and leave a run folder."""
    experiment = Experiment.from_run_config(context.run_config)
    folder = Path(experiment.run.out).expanduser()
    goes_on = bool(experiment.run.out) and is_cut_short(folder)
    if goes_on:
        experiment = read_cut_short(folder)
    searches = experiment.search.rounds if experiment.search.federated else 0
    with Progress(experiment.strategy.num_rounds, experiment.data.metric, searches) as progress:
        prepared = prepare(experiment, progress, found=found_before(folder) if goes_on else None)
        out = RunFolder(folder) if goes_on else new_run_folder(experiment)
        journal = check_journal(folder, prepared) if goes_on else None
        result = federate(grid, prepared, out, progress, journal)
        for warning in result["quality"]["warnings"]:
            progress.say(f"warning: {warning}")
