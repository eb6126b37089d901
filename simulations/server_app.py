"""The ServerApp of `flwr run`: the experiment is the app's run config."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedpet.config import Experiment
from fedpet.simulations.federation import federate, prepare
from fedpet.simulations.progress import Progress
from fedpet.simulations.run_folder import new_run_folder

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation and leave a run folder."""
    experiment = Experiment.from_run_config(context.run_config)
    with Progress(experiment.strategy.num_rounds, experiment.data.metric) as progress:
        prepared = prepare(experiment, progress)
        federate(grid, prepared, new_run_folder(experiment), progress)
