"""The ClientApp of `flwr run`: each message is answered by the node resident in this process.

What a SuperNode was started with (`--node-config`) stands above the run's settings: a device knows
best where its own rows, checkpoint and cache are.
"""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedpet.loading import without_collection

with without_collection():  # torch is imported here
    from fedpet.client import reply
    from fedpet.config import Experiment
    from fedpet.node_settings import NodeSettings

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the clients that the message names."""
    return reply(message, _settings(context))


@app.query()
def query(message: Message, context: Context) -> Message:
    """Say who lives here."""
    return reply(message, _settings(context))


def _settings(context: Context) -> NodeSettings:
    experiment = Experiment.from_run_config(context.run_config)
    return NodeSettings.of(experiment, context.node_config).on(context.node_config)
