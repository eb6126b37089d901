"""Make the ClientApp of a node: its handlers pass each message to the node of this process.

A SuperNode's own config (`--node-config`) stands above the run's settings: a device knows best
where its rows, checkpoint and cache are.

The run config's `clients-script` is heeded in a simulation alone. It is told from a real node by
the process, one of Ray's workers, and by nothing that a server sends; one with rows of its own is
real in any case.
"""

import sys
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedpet.utils.gc_paused import gc_paused

with gc_paused():  # torch is imported here
    from fedpet.client.node import reply
    from fedpet.client.node_config import NodeConfig, refuse_script, script_in_app
    from fedpet.config import Experiment
    from fedpet.utils.source_digest import check_source_digest


def make_client_app(code: str = "", app: Path | None = None) -> ClientApp:
    """Make the app of a node.

    Args:
        code: Digest of the fedpet that a run is of; each message is refused where this one has
            another, and the server is told why. "" takes this one.
        app: The folder of the app, from which a relative `clients-script` of a simulation leads.
    """
    made = ClientApp()

    @made.train()
    def train(message: Message, context: Context) -> Message:
        """Train the clients that the message names."""
        return _answer(message, context, code, app)

    @made.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        """Measure values on rows of the clients that the message names."""
        return _answer(message, context, code, app)

    @made.query()
    def query(message: Message, context: Context) -> Message:
        """Register the clients of this node."""
        return _answer(message, context, code, app)

    return made


def _answer(message: Message, context: Context, code: str, app: Path | None) -> Message:
    if code:
        check_source_digest(code)
    experiment = Experiment.from_run_config(context.run_config)
    if _is_simulated() and "data" not in context.node_config:
        return reply(message, NodeConfig.simulated(script_in_app(experiment, app)))
    refuse_script(experiment)
    return reply(message, NodeConfig.from_experiment(experiment, context.node_config))


def _is_simulated() -> bool:
    """Tell a worker of Flower's simulation: a real node's process is none of Ray's."""
    ray = sys.modules.get("ray")
    return (
        ray is not None
        and ray.is_initialized()
        and ray.get_runtime_context().get_actor_id() is not None
    )
