"""The ServerApp of `flwr run`."""

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedpet.run.flower_server import serve_run

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the run config describes, and leave a run folder."""
    serve_run(grid, context, Path(__file__).parents[1])
