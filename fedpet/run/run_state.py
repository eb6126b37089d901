"""Evaluate the model after a round, write its line and the journal, and call the callbacks.

In:  the global values after a round, from Flower's loop.
Out: the round's metric, its line in `rounds.jsonl`, and after that the journal that vouches for it.

A round that came to no average has no journal: a run goes on after the last that had one. Where
`STALLED_ROUNDS` in a row had none the run stops, and can be gone on with.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import torch
from flwr.app import ArrayRecord, MetricRecord

from fedpet.client.node_config import cache_folder
from fedpet.errors import Stalled
from fedpet.protocol.ledger import Ledger
from fedpet.run.callbacks import Callback, Evaluation
from fedpet.run.checkpoint_file import RunCheckpoint
from fedpet.run.resume import JournalWriter, restore_strategy
from fedpet.run.run_folder import RunFolder
from fedpet.server.aggregation import from_arrays
from fedpet.server.rounds import SparseStrategy
from fedpet.training.evaluation import assess_rows
from fedpet.training.metrics import Assessment

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fedpet.run.prepare import Prepared

STALLED_ROUNDS = 5  # in a row


class RunState:
    """The state of a run between its rounds.

    Attributes:
        values: Global values, float32, (num_values,).
        rounds_left: To be run from here on.
    """

    def __init__(
        self,
        prepared: Prepared,
        strategy: SparseStrategy,
        ledger: Ledger,
        out: RunFolder,
        callback: Callback,
        journal: RunCheckpoint | None,
        *,
        resumed: int = 0,
    ) -> None:
        """Begin, or take up what a journal holds and hand the strategy its part.

        Args:
            prepared: What to run.
            strategy: Runs the rounds.
            ledger: Takes their lines.
            out: Takes the journal.
            callback: Is called at each round.
            journal: Of training rounds; None begins at the beginning.
            resumed: How often the run has been gone on with.
        """
        self._prepared = prepared
        self._strategy = strategy
        self._ledger = ledger
        self._callback = callback
        self._out = out
        self._last_round = prepared.experiment.strategy.num_rounds
        self._merged: PreTrainedModel | None = None
        self._assessed: Assessment | None = None  # the last evaluation of this process
        self._goes_on = journal is not None
        start = prepared.start
        self.values = np.zeros(prepared.plan.num_values, np.float32) if start is None else start
        if journal is not None:
            self.values = restore_strategy(out.path, journal, strategy)
        self._journal = JournalWriter(out.path, prepared, strategy, resumed=resumed)
        self.rounds_left = self._last_round - strategy.rounds_done

    def round_over(self, loop_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Close a round; Flower's loop calls it before its first one, as round 0, and after each.

        Args:
            loop_round: Counted by Flower's loop, from where the run was taken up.
            arrays: The global values.
        """
        if loop_round == 0 and self._goes_on:
            return None  # that round was over before
        experiment, data = self._prepared.experiment, self._prepared.data
        server_round = loop_round + self._strategy.rounds_done
        self.values = from_arrays(arrays)
        record = self._ledger.begin(0) if server_round == 0 else self._ledger.current
        last = server_round == self._last_round
        if record.aggregated and is_saved(experiment.run.save_every, server_round, last=last):
            self._load_values()
            self._out.write_adapter(self._prepared.pet, experiment, server_round)
        if last or server_round % experiment.strategy.evaluate_every == 0:
            clock = time.perf_counter()
            self._load_values()
            model = self.final_model() if last else self._prepared.pet.model
            self._assessed = self._assess(model)
            record.metric = self._assessed.value
            record.metrics = dict(self._assessed.metrics)
            record.by_client = dict(self._assessed.by_client)
            record.evaluation_seconds = time.perf_counter() - clock
        ledger_bytes = self._ledger.close()
        if record.aggregated or last or server_round == 0:
            self._journal.write(
                server_round=server_round, values=self.values, ledger_bytes=ledger_bytes
            )
        if record.metric is not None:
            seconds = record.evaluation_seconds
            metrics = {data.task.metric: record.metric, **record.metrics}
            self._callback.on_evaluate(
                Evaluation(round=server_round, metrics=metrics, seconds=seconds)
            )
        self._callback.on_round_end(record, self._ledger)
        if not last:
            refuse_stalled(self._ledger)
        return None if record.metric is None else MetricRecord({**record.metrics})

    def final_model(self) -> PreTrainedModel:
        """Return the plain model with the values folded in; made once, after the last round.

        It is the run's own model: the adapted one is used up.
        """
        if self._merged is None:
            self._load_values()
            self._merged = self._prepared.pet.merge_and_unload()
        return self._merged

    def final_assessment(self) -> Assessment:
        """Return the final model's evaluation; made anew for a run resumed after its last round."""
        if self._assessed is None:
            self._assessed = self._assess(self.final_model())
        return self._assessed

    def _assess(self, model: PreTrainedModel) -> Assessment:
        data, experiment = self._prepared.data, self._prepared.experiment
        cache, dtype = cache_folder(experiment), experiment.run.evaluation_dtype
        return assess_rows(model, data.evaluation, data.task, cache=cache, dtype=dtype)

    def _load_values(self) -> None:
        values = torch.from_numpy(self.values.copy())
        self._prepared.pet.set_delta(values, seed=self._prepared.plan.seed)


def is_saved(every: int, server_round: int, *, last: bool) -> bool:
    """Tell whether an adapter is left after a round: every so many, and after the last."""
    return every > 0 and server_round > 0 and (last or server_round % every == 0)


def refuse_stalled(ledger: Ledger) -> None:
    """Stop where the last rounds came to no average.

    Raises:
        Stalled: There were `STALLED_ROUNDS` of them in a row.
    """
    rounds = ledger.of_kind(ledger.current.kind)[-STALLED_ROUNDS:]
    if len(rounds) < STALLED_ROUNDS or any(r.aggregated or r.round == 0 for r in rounds):
        return
    raise Stalled(
        f"rounds {rounds[0].round} to {rounds[-1].round} met no quorum of usable replies, and the "
        f"run stops here: {ledger.path} says who was refused, and why. Mend that first; what goes "
        "on then goes on after the last round that came to an average."
    )
