"""The ClientApp of `flwr run`: each message is answered by the node resident in this process."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedpet.client import NodeSettings, reply
from fedpet.config import Experiment

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the clients that the message names."""
    experiment = Experiment.from_run_config(context.run_config)
    return reply(message, NodeSettings.of(experiment, context.node_config))
