"""Evaluate the model after a round, write its line and the journal, and call the callbacks.

In:  the global values after a round, from Flower's loop.
Out: the round's metric, its line in `rounds.jsonl`, and after that the journal that vouches for it;
     in the end the last round's model, or the best one's.

The server evaluates on its own rows. Where it has none, the metric is the clients' mean, which they
measured as they trained in the next round; the last values they are sent once more. Clients that
never train measure too (fedpet/server/measuring.py).

A round that came to no average has no journal: a run goes on after the last that had one. Where
`STALLED_ROUNDS` in a row had none the run stops, and can be gone on with.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import torch
from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp import Grid

from fedpet.backbone.classifier import generates
from fedpet.backbone.pretrained import locate
from fedpet.client.node_config import cache_folder
from fedpet.errors import Stalled
from fedpet.protocol.ledger import Ledger, RoundRecord
from fedpet.run.callbacks import Callback, Evaluation
from fedpet.run.checkpoint_file import RunCheckpoint
from fedpet.run.client_quality import AFTER_LAST, UNSEEN, KeptRound, final_on_clients
from fedpet.run.generations import read_generations, samples_of
from fedpet.run.resume import JournalWriter, restore_strategy
from fedpet.run.run_folder import RunFolder
from fedpet.server.aggregation import from_arrays
from fedpet.server.client_spread import spreads_of
from fedpet.server.rounds import SparseStrategy
from fedpet.training.evaluation import assess_rows
from fedpet.training.generation import Writer
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
        grid: Grid | None = None,
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
            grid: Reaches the clients that measure outside of training; None: none do.
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
        self._grid = grid
        self._has_rows = len(prepared.data.evaluation) > 0
        experiment = prepared.experiment
        self._writer = Writer(locate(experiment.backbone), experiment.data.max_new_tokens)
        self._kept = None if journal is None else journal.kept
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
        before, self.values = self.values, from_arrays(arrays)
        record = self._ledger.begin(0) if server_round == 0 else self._ledger.current
        last = server_round == self._last_round
        if record.aggregated and is_saved(experiment.run.save_every, server_round, last=last):
            self._load_values()
            self._out.write_adapter(self._prepared.pet, experiment, server_round)
        due = last or server_round % experiment.strategy.evaluate_every == 0
        if server_round == 0 and self._prepared.experiment.run.sample_prompts:
            self._load_values()
            self.write_samples(self._prepared.pet.model, "before")
        if due and self._has_rows:
            clock = time.perf_counter()
            self._load_values()
            at_end = last and not self._keeps_best
            model = self.final_model() if at_end else self._prepared.pet.model
            self._assessed = self._assess(model)
            record.metric = self._assessed.value
            record.metrics = dict(self._assessed.metrics)
            record.by_client = dict(self._assessed.by_client)
            record.evaluation_seconds = time.perf_counter() - clock
        ledger_bytes = self._ledger.close()
        measured = self._have_measured(server_round, last=last)
        if measured is not None:
            ledger_bytes = self._ledger.close()
        self._note_best(record, measured, server_round, before)
        if record.aggregated or last or server_round == 0:
            self._journal.write(
                server_round=server_round,
                values=self.values,
                ledger_bytes=ledger_bytes,
                kept=self._kept,
            )
        if record.metric is not None:
            seconds = record.evaluation_seconds
            metrics = {data.task.metric: record.metric, **record.metrics}
            self._callback.on_evaluate(
                Evaluation(round=server_round, metrics=metrics, seconds=seconds)
            )
        self._callback.on_round_end(record, self._ledger)
        if measured is not None:
            self._callback.on_round_end(measured, self._ledger)
        if not last:
            refuse_stalled(self._ledger)
        return None if record.metric is None else MetricRecord({**record.metrics})

    def _have_measured(self, server_round: int, *, last: bool) -> RoundRecord | None:
        """Have clients measure these values outside of training, where that is due.

        Returns:
            The line of it, which is open; None where nobody was asked.
        """
        rule, settings = self._prepared.plan.evaluation, self._prepared.experiment.clients
        if rule is None or self._grid is None:
            return None
        often = settings.unseen_every
        groups: dict[str, list[str]] = {}
        if rule.unseen_fraction and (last or (often and server_round % often == 0)):
            groups[UNSEEN] = self._strategy.population.unseen()
        if last and not self._has_rows:
            groups[AFTER_LAST] = self._strategy.next_clients(server_round + 1)
        if not any(groups.values()):
            return None
        names = [name for group in groups.values() for name in group]
        found = self._strategy.measuring().run(self._grid, server_round, self.values, names)
        record, metric = self._ledger.current, self._prepared.plan.task.metric
        for group, members in groups.items():
            metrics = [found[name] for name in members if name in found]
            if spread := spreads_of(metrics, metric).get("before"):
                record.on_clients[group] = spread
        return record

    def _note_best(
        self,
        record: RoundRecord,
        measured: RoundRecord | None,
        server_round: int,
        before: np.ndarray,
    ) -> None:
        """Keep the values of the best round; clients measure in a round those of the one before."""
        if not self._keeps_best:
            return
        metric = self._prepared.plan.task.metric
        found = [(server_round, record.metric, self.values)]
        if not self._has_rows:
            own = record.on_clients.get("before", {}).get("row_mean")
            after = {} if measured is None else measured.on_clients.get(AFTER_LAST, {})
            found = [
                (server_round - 1, own, before),
                (server_round, after.get("row_mean"), self.values),
            ]
        for number, value, values in found:
            self._kept = KeptRound.better(self._kept, number, value, values, metric)

    @property
    def _keeps_best(self) -> bool:
        return self._prepared.experiment.run.keep == "best"

    @property
    def kept(self) -> KeptRound | None:
        """The round whose model is the run's, where that is the best one's and not the last's."""
        return self._kept

    def final_model(self) -> PreTrainedModel:
        """Return the plain model with the values folded in; made once, after the last round.

        It is the run's own model: the adapted one is used up. `values` are the kept round's then.
        """
        if self._merged is None:
            if self._kept is not None:
                self.values, self._assessed = self._kept.values, None
            self._load_values()
            self._merged = self._prepared.pet.merge_and_unload()
        return self._merged

    def final_assessment(self) -> Assessment:
        """Return the final model's evaluation; made anew for a run resumed after its last round."""
        if not self._has_rows:
            number = self._last_round if self._kept is None else self._kept.server_round
            return final_on_clients(self._ledger, self._prepared.plan.task.metric, number)
        if self._assessed is None:
            self._assessed = self._assess(self.final_model())
        return self._assessed

    def _assess(self, model: PreTrainedModel) -> Assessment:
        data, experiment = self._prepared.data, self._prepared.experiment
        cache, dtype = cache_folder(experiment), experiment.run.evaluation_dtype
        return assess_rows(
            model, data.evaluation, data.task, cache=cache, dtype=dtype, writer=self._writer
        )

    def write_samples(self, model: PreTrainedModel, when: str) -> None:
        """Leave what the model writes for the run's prompts, "before" training or "after"."""
        rows, count = self._prepared.data.evaluation, self._prepared.experiment.run.sample_prompts
        writes = rows.marks is not None and rows.dense is None and generates(model)
        if not count or not len(rows) or not writes:
            return
        earlier = read_generations(self._out.path)
        entries = samples_of(model, rows, self._writer, count, earlier=earlier, when=when)
        self._out.write_generations(entries)

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
    rounds = ledger.of_kind(ledger.kind)[-STALLED_ROUNDS:]
    if len(rounds) < STALLED_ROUNDS or any(r.aggregated or r.round == 0 for r in rounds):
        return
    raise Stalled(
        f"rounds {rounds[0].round} to {rounds[-1].round} met no quorum of usable replies, and the "
        f"run stops here: {ledger.path} says who was refused, and why. Mend that first; what goes "
        "on then goes on after the last round that came to an average."
    )
