"""Add up the books of a run for `result.json`, of fedpet and of every baseline.

README, "The run folder", says what each field means. Bytes are counted on the serialised
messages; a share is a fraction; seconds are wall time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fedpet.config import ClientEvaluation, Experiment, TrainingConfig
from fedpet.data import count_classes
from fedpet.protocol.ledger import EVALUATION, SEARCH, TRAINING, Ledger, RoundRecord
from fedpet.run.client_quality import KeptRound, client_evaluations, metric_on_clients
from fedpet.run.quality import quality_of, status_of
from fedpet.run.run_folder import machine, versions
from fedpet.training.metrics import Assessment

if TYPE_CHECKING:
    from fedpet.backbone.pretrained import Origin
    from fedpet.data import FederatedData
    from fedpet.pet.layout import Segment

BYTES_PER_FLOAT = 4


def summarise(
    experiment: Experiment,
    *,
    method: str,
    ledger: Ledger,
    data: FederatedData,
    fingerprint: str,
    plan_digest: str,
    values_by_kind: dict[str, int],
    pretrained_parameters: int,
    added_parameters: int = 0,
    inexact_kinds: Sequence[str] = (),
    values_sha256: str,
    final: Assessment,
    total_seconds: float,
    resumed: int = 0,
    tiers: Sequence[dict[str, Any]] = (),
    structure_method: str = "",
    origin: Origin,
    training: TrainingConfig | None = None,
    kept: KeptRound | None = None,
) -> dict[str, Any]:
    """Make the content of `result.json`.

    Args:
        experiment: What was run.
        method: "fedpet", or the baseline's name.
        ledger: The closed books.
        data: What was trained and evaluated on.
        fingerprint: Of the checkpoint.
        plan_digest: Of the plan, hex; empty for a baseline.
        values_by_kind: Communicated values by kind; "mask" and "head" are told apart.
        pretrained_parameters: Of the backbone, its new head not counted.
        added_parameters: That the merged model has beyond the backbone and its head.
        inexact_kinds: Whose average is not the average of models.
        values_sha256: Of the final communicated values, float32, little-endian.
        final: The merged model's outputs on the evaluation rows, measured.
        total_seconds: From the first stage to the last, the time that nothing ran left out.
        resumed: How often the run was cut short and gone on with.
        tiers: Density, values and clients of each tier, where devices differ in strength.
        structure_method: By which the structure was found: "s3pet" where it was searched, "" where
            it was chosen by hand.
        origin: What of the model came from the checkpoint, and what did not.
        training: As it was in force, with the rates that were derived from the model; None is the
            experiment's.
        kept: The round whose values are the final ones, where that is the best one's.
    """
    rounds = [record for record in ledger.of_kind(TRAINING) if record.round > 0]
    num_values = sum(values_by_kind.values())
    training = experiment.training if training is None else training
    rule = ClientEvaluation.of(experiment.clients)
    trained = [c for c in data.clients if rule is None or not rule.is_unseen(c.id)]
    kinds = [*values_by_kind] if method == "fedpet" else None
    head, mask = values_by_kind.get("head", 0), values_by_kind.get("mask", 0)
    return {
        "schema": 1,
        "run": {
            "experiment": experiment.run.name,
            "method": method,
            "seed": experiment.run.seed,
            "backbone": experiment.backbone.model,
            "codec": str(experiment.codec),
            "date": time.strftime("%Y-%m-%d %H:%M %z"),
            "fingerprint": fingerprint,
            "plan_digest": plan_digest,
            "versions": versions(),
            "machine": machine(experiment.run.device),
            "status": status_of(rounds, final),
            "resumed": resumed,
            **_kept(kept, experiment),
        },
        "model": {
            "backbone_parameters": pretrained_parameters,
            "communicated_values": num_values,
            "mask_values": mask,
            "structure_values": num_values - mask - head,
            "head_values": head,
            "values_by_kind": values_by_kind,
            "structure_method": structure_method,
            "inexact_kinds": list(inexact_kinds),
            "inference_parameters_added": added_parameters,
            "tiers": list(tiers),
            "head": experiment.backbone.head,
            "origin": origin.to_json(),
        },
        "training": {
            "optimizer": training.optimizer,
            "schedule": training.schedule_in_force,
            "warmup_rounds": training.warmup_rounds,
            "automatic_rates": training.has_auto_rates,
            "learning_rates": {kind: training.rate_of(kind) for kind in values_by_kind},
        },
        "data": {
            "clients": len(data.clients),
            "clients_left_out": data.left_out_clients,
            "train_rows": sum(len(client.rows) for client in trained),
            **_held_out(rule, data),
            "train_rows_left_out": data.left_out_rows,
            "evaluation_rows": len(data.evaluation),
            **_label_tokens(data),
            "classes": [asdict(one) for one in count_classes(data)],
            "rows": {split: asdict(books) for split, books in data.books.items()},
        },
        "quality": quality_of(
            experiment,
            ledger.of_kind(TRAINING),
            final,
            metric=data.task.metric,
            num_rows=len(data.evaluation),
            trained_kinds=kinds,
            training=training,
            measured=None if len(data.evaluation) else metric_on_clients(ledger),
        )
        | ({"on_clients": measured} if (measured := client_evaluations(ledger)) else {}),
        "communication": _communication(ledger, pretrained_parameters + head),
        "time": {
            "total_seconds": total_seconds,
            "rounds_seconds": ledger.total("round_seconds", TRAINING),
            "local_training_seconds": ledger.total("train_seconds", TRAINING),
            "evaluation_seconds": ledger.total("evaluation_seconds"),
            "first_round_seconds": rounds[0].round_seconds,
            "outside_training_fraction": _outside_training(rounds[1:]),
            **_search_seconds(ledger),
            **_measuring_seconds(ledger),
        },
        "refused": [
            {**_when(record), **refused}
            for record in (*ledger.of_kind(SEARCH), *rounds, *ledger.of_kind(EVALUATION))
            for refused in record.refused
        ],
        "events": [
            {**_when(record), **event}
            for record in (*ledger.of_kind(SEARCH), *rounds)
            for event in record.events
        ],
        "final_values_sha256": values_sha256,
    }


def _label_tokens(data: FederatedData) -> dict[str, int]:
    """Count the label tokens, where tokens have labels; those on nodes are not known here."""
    if not data.evaluation.has_token_labels:
        return {}
    train = sum(int(data.train.labels[c.rows].sum()) for c in data.clients if len(data.train))
    return {
        "train_label_tokens": train,
        "evaluation_label_tokens": int(data.evaluation.labels.sum()),
    }


def count_by_kind(segments: Sequence[Segment]) -> dict[str, int]:
    """Communicated values by kind, in the order of the layout."""
    counts: dict[str, int] = {}
    for segment in segments:
        counts[segment.kind] = counts.get(segment.kind, 0) + segment.size
    return counts


def _when(record: RoundRecord) -> dict[str, Any]:
    when: dict[str, Any] = {"round": record.round}
    return when if record.kind == TRAINING else {"kind": record.kind, **when}


_SUMS = ("uplink_bytes", "downlink_bytes", "plan_bytes", "wire_bytes", "messages")


def _communication(ledger: Ledger, dense_parameters: int) -> dict[str, Any]:
    """Sum the bytes of the run, a search of the structure included.

    Means are over the training rounds. Dense FedAvg, which searches nothing, is of those rounds: 4
    bytes a parameter, no framing.
    """
    sums = {name: int(ledger.total(name)) for name in _SUMS}
    asked, answered = (int(ledger.total(name, TRAINING)) for name in ("clients", "replies"))
    total = sums["uplink_bytes"] + sums["downlink_bytes"] + sums["plan_bytes"]
    dense = BYTES_PER_FLOAT * dense_parameters * (asked + answered)
    up, down, plan = (ledger.total(name, TRAINING) for name in _SUMS[:3])
    books: dict[str, Any] = {
        "plan_bytes_per_client": plan / max(int(ledger.total("newcomers", TRAINING)), 1),
        "uplink_bytes": sums["uplink_bytes"],
        "downlink_bytes": sums["downlink_bytes"],
        "plan_bytes": sums["plan_bytes"],
        "total_bytes": total,
        "messages": sums["messages"],
        "uplink_bytes_per_client_round": up / max(answered, 1),
        "downlink_bytes_per_client_round": down / max(asked, 1),
        "dense_fedavg_total_bytes": dense,
        "ratio_to_dense": total / dense,
        "wire_bytes": sums["wire_bytes"],
        "wire_by_kind": ledger.wire_by_kind,
    }
    kinds = [kind for kind in (SEARCH, TRAINING, EVALUATION) if ledger.of_kind(kind)]
    if len(kinds) > 1:
        books["by_kind"] = {kind: _of_kind(ledger, kind) for kind in kinds}
    return books


def _of_kind(ledger: Ledger, kind: str) -> dict[str, int]:
    """Sum the bytes of one kind of rounds, and count them."""
    sums = {name: int(ledger.total(name, kind)) for name in _SUMS}
    total = sums["uplink_bytes"] + sums["downlink_bytes"] + sums["plan_bytes"]
    rounds = sum(record.round > 0 or kind == EVALUATION for record in ledger.of_kind(kind))
    return {"rounds": rounds, "total_bytes": total, **sums}


def _search_seconds(ledger: Ledger) -> dict[str, float]:
    """Sum the seconds of the rounds of a search, where there was one."""
    if not ledger.of_kind(SEARCH):
        return {}
    return {"search_rounds_seconds": ledger.total("round_seconds", SEARCH)}


def _measuring_seconds(ledger: Ledger) -> dict[str, float]:
    """Sum the longest nodes' seconds of measuring, where clients measured."""
    seconds = ledger.total("client_evaluation_seconds")
    return {"client_evaluation_seconds": seconds} if seconds else {}


def _kept(kept: KeptRound | None, experiment: Experiment) -> dict[str, Any]:
    """Name the round whose model is the run's, where that is the best one's."""
    if kept is None:
        return {}
    where = experiment.data.eval_on
    found = {"round": kept.server_round, "by": experiment.data.metric, "value": kept.metric}
    return {"kept": {**found, "on": where, "of": experiment.strategy.num_rounds}}


def _held_out(rule: ClientEvaluation | None, data: FederatedData) -> dict[str, int]:
    """Count what is kept from training, where anything is, and the rows are known here."""
    if rule is None or not len(data.train):
        return {}
    return {
        "clients_unseen": sum(rule.is_unseen(client.id) for client in data.clients),
        "clients_without_held_out": sum(not len(client.held_out) for client in data.clients),
        "rows_held_out": sum(len(client.held_out) for client in data.clients),
    }


def _outside_training(rounds: Sequence[RoundRecord]) -> float | None:
    """Seconds of rounds that are not local training, as a fraction of those that are."""
    training = sum(record.train_seconds for record in rounds)
    if not training:
        return None
    own = [record.train_seconds + record.client_evaluation_seconds for record in rounds]
    return sum(r.round_seconds - seconds for r, seconds in zip(rounds, own, strict=True)) / training
