"""What one client carries over from round to round, where the plan has error feedback.

    ... -> codec -> plan -> [client] -> strategy -> ledger -> report

In:  what is kept of the run on this node (fedpet/client/state_store.py), and the last round of
     which the
     server says that it took the client's payload.
Out: the residual that this round's update begins with, and a place for the one that it leaves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedpet.client.state_store import NodeState
from fedpet.errors import FrameError, PlanError
from fedpet.protocol.request import RESIDUAL_MISSING

__all__ = ["Residuals"]


@dataclass(frozen=True)
class Residuals:
    """The residuals of one client, in one round.

    Attributes:
        state: What is kept of the run; None where its messages name none.
        client: Its number.
        server_round: This round.
        accepted: The last round of which the server took its payload; 0 for none.
    """

    state: NodeState | None
    client: int
    server_round: int
    accepted: int

    def last(self, count: int) -> np.ndarray | None:
        """What its last accepted payload left; None where none was accepted yet.

        Raises:
            FrameError: The accepted round is not before this one.
            PlanError: It is not held here any more.
        """
        if not self.accepted or self.state is None:
            return None
        if self.accepted >= self.server_round:
            raise FrameError(
                f"the last accepted round must be before this one, which is {self.server_round}, "
                f"got {self.accepted}."
            )
        residual = self.state.residual(self.client, self.accepted, count)
        if residual is None:
            raise PlanError(RESIDUAL_MISSING)
        return residual

    def keep(self, residual: np.ndarray) -> None:
        """Keep what this round's payload left."""
        if self.state is not None:
            self.state.keep_residual(
                self.client, self.server_round, residual, accepted=self.accepted
            )
