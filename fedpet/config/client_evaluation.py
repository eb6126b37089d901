"""State the rule of evaluation on clients: which rows and which clients are kept from training.

In:  `ClientsConfig`.
Out: a `ClientEvaluation`, which travels in the plan, so that server and nodes keep out the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedpet.config.ranges import Count, Stage, Whole
from fedpet.config.schema import ClientsConfig, OwnFraction, UnseenFraction
from fedpet.config.value_checks import check_choice
from fedpet.utils.seeds import client_id64, derive_seed

__all__ = ["ClientEvaluation"]


@dataclass(frozen=True, kw_only=True)
class ClientEvaluation(Stage):
    """The rule of a run; there is none where neither rows nor clients are kept from training.

    Attributes:
        fraction: Of each client's rows, which it holds out.
        min_rows: That a client must have left to train on; else it holds out none.
        values: "both" or "before".
        unseen_fraction: Of the clients, which never train.
        seed: Of their choice.
    """

    table_name = "clients"

    fraction: OwnFraction
    min_rows: Count
    values: str
    unseen_fraction: UnseenFraction
    seed: Whole

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("clients.eval-values", self.values, ("both", "before"))

    @classmethod
    def of(cls, clients: ClientsConfig) -> ClientEvaluation | None:
        """Return the rule of a run's settings; None where there is none."""
        if not clients.eval_fraction and not clients.unseen_fraction:
            return None
        return cls(
            fraction=clients.eval_fraction,
            min_rows=clients.min_rows,
            values=clients.eval_values,
            unseen_fraction=clients.unseen_fraction,
            seed=clients.seed,
        )

    def is_unseen(self, client: int | str) -> bool:
        """Tell if a client never trains.

        Args:
            client: Its name, or its number in messages.
        """
        number = client_id64(client) if isinstance(client, str) else client
        return derive_seed("unseen", self.seed, number) < self.unseen_fraction * 2**63
