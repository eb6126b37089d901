"""Say why a client is refused, to the server and in the node's own log.

The log gets the whole reason. The server gets it too, unless it may quote what is in the rows: an
error about data names a label, a text or a column, and a server that chooses plans could read a
data set row by row out of such reasons. It learns that the rows cannot be used, and no more.
"""

from __future__ import annotations

import logging

import torch

from fedpet.errors import AbsentDataError, DataError, FedpetError

__all__ = ["reason_for_server"]

LOG = logging.getLogger("fedpet")


def reason_for_server(error: Exception, client: int, *, own_rows: bool) -> str:
    """Return what the server is told of an error, and log what it is.

    Args:
        error: As it was raised on the node.
        client: Number of the client; 0 where the node registers.
        own_rows: The rows are the node's own, and not the server's as in a simulation.
    """
    who = f"client {client:016x}" if client else "the registration"
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        LOG.warning("%s: memory ran out", who, exc_info=error)
        return "memory ran out as it trained: lower training.batch-size or data.max-length."
    if isinstance(error, DataError) and own_rows and not isinstance(error, AbsentDataError):
        LOG.warning("%s was refused: %s", who, error)
        return "its rows cannot be used as the plan asks: the node's log says why."
    if isinstance(error, FedpetError | FloatingPointError | OSError):
        LOG.warning("%s was refused: %s", who, error)
        return str(error)
    LOG.warning("%s was not trained", who, exc_info=error)
    return f"its training failed with {type(error).__name__}: see the node's log."
