"""Make the ClientApp of a node: its handlers pass each message to the node of this process.

A SuperNode's own config (`--node-config`) stands above the run's settings: a device knows best
where its rows, checkpoint and cache are.
"""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedpet.utils.gc_paused import gc_paused

with gc_paused():  # torch is imported here
    from fedpet.client.node import reply
    from fedpet.client.node_config import NodeConfig
    from fedpet.config import Experiment
    from fedpet.utils.source_digest import check_source_digest


def make_client_app(code: str = "") -> ClientApp:
    """Make the app of a node.

    Args:
        code: Digest of the fedpet that a run is of; each message is refused where this one has
            another, and the server is told why. "" takes this one.
    """
    made = ClientApp()

    @made.train()
    def train(message: Message, context: Context) -> Message:
        """Train the clients that the message names."""
        return _answer(message, context, code)

    @made.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        """Measure values on rows of the clients that the message names."""
        return _answer(message, context, code)

    @made.query()
    def query(message: Message, context: Context) -> Message:
        """Register the clients of this node."""
        return _answer(message, context, code)

    return made


def _answer(message: Message, context: Context, code: str) -> Message:
    if code:
        check_source_digest(code)
    experiment = Experiment.from_run_config(context.run_config)
    return reply(message, NodeConfig.from_experiment(experiment, context.node_config))
