"""Sum the bytes of a run's messages, and the seconds they take, into an estimate.

Every sampled client is taken to answer, alone on its node, as the ledger counts it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedpet.backbone.pretrained import Backbone
from fedpet.client.node_config import make_cache
from fedpet.codec import check_codecs
from fedpet.codec.integers import GRIDS
from fedpet.codec.spec import parse_codec
from fedpet.config import Experiment
from fedpet.data import ClientCounts, Task, count_clients
from fedpet.errors import ConfigError, DataError
from fedpet.estimate.idle_traffic import idle_bytes
from fedpet.estimate.links import LINKS, Link
from fedpet.estimate.message_sizes import (
    frames_down,
    made_up_plan,
    measuring_bytes,
    reply_bytes,
    request_bytes,
    roll_call_bytes,
)
from fedpet.estimate.meta_model import outline
from fedpet.estimate.participants import Draws, draw
from fedpet.estimate.payload_simulation import Payloads, is_fixed, local_steps, payloads
from fedpet.estimate.value_counts import LORA_RANK, Layout, count_values
from fedpet.protocol.frame import HEADER_BYTES
from fedpet.protocol.plan import Plan
from fedpet.tasks import kind_of
from fedpet.tasks.class_labels import check_label_names

__all__ = ["Estimate", "estimate"]

SCHEMA = 1
BYTES_PER_FLOAT = 4

# How far a payload may be from a run's, as a fraction. Measured on real runs, see the tests.
_TOLERANCE = 0.01
_TOLERANCE_OF_ROWS = 0.03  # where clients are assumed to hold the same number of rows
_TOLERANCE_OF_TAILS = 0.05  # top-k, and blocks, whose largest of 64 or 1024 values is the scale
_TOLERANCE_OF_ONE_STEP = 0.2  # of the updates of clients that take a single step


@dataclass(frozen=True)
class Estimate:
    """Hold a run's cost. Bytes are those of whole messages; MB is 10^6 bytes."""

    run: dict[str, Any]  # names, codecs, rounds, clients
    model: dict[str, Any]  # parameters and values, as `result.json` has them
    message: dict[str, Any]  # mean lengths from payload to whole message, and of the plan
    communication: dict[str, Any]  # the run's bytes, named as in `result.json`; and LoRA's
    links: list[dict[str, Any]]  # for each link the seconds of a client's messages
    tolerance: float  # how far the bytes may be from a run's; 0 where payloads have one length
    notes: list[str]  # assumptions, a sentence each

    def to_json(self) -> dict[str, Any]:
        """All of it, for a JSON file."""
        return {"schema": SCHEMA, **dataclasses.asdict(self)}


def estimate(
    experiment: Experiment,
    *,
    num_clients: int | None = None,
    rows_per_client: int | None = None,
    links: Sequence[Link] = LINKS,
) -> Estimate:
    """Estimate a run's cost.

    Args:
        experiment: The run. Its backbone may be a configuration without weights.
        num_clients: How many clients there are; None counts them in the data.
        rows_per_client: That each of them holds; only with `num_clients`.
        links: Whose seconds to compute.

    Raises:
        InputError: The configuration, the codecs, the structure or the data cannot be used.
    """
    if experiment.search.federated:
        raise ConfigError(
            "an estimate foresees the rounds of a structure that is known, and search.federated "
            "finds it in the run: estimate with search.federated = false and a preset or file of "
            "the same size."
        )
    check_codecs(experiment.codec)
    check_label_names(experiment.data)
    notes: list[str] = []
    census = _census(experiment, num_clients, rows_per_client, notes)
    task = census.task if census else _assumed_task(experiment, notes)
    draws = draw(experiment, census, num_clients, rows_per_client)
    backbone = outline(experiment.backbone, task)
    layout = count_values(backbone, experiment)
    plan = made_up_plan(experiment, layout, task)
    counts = [sum(size for _, size in kinds) for kinds in layout.tiers]
    lengths = payloads(layout.tiers, plan, experiment.strategy, draws.rounds)
    parts = [(r, taker) for r, takers in enumerate(draws.rounds) for taker in takers]
    up = _mean(lengths.up[r, taker.tier] for r, taker in parts)
    frames = frames_down(lengths, draws.rounds, changes=plan.is_delta_downlink)
    down = _mean(length for each in frames for length in each)
    values = _mean(counts[taker.tier] for _, taker in parts)
    measures = plan.measures and _mean(taker.measures for _, taker in parts)  # the share
    with_metric = reply_bytes(round(up), measures=True) - reply_bytes(round(up))
    uplink = up + reply_bytes(round(up)) - round(up) + measures * with_metric
    downlink = down + request_bytes(round(down), plan) - round(down)
    plan_length = len(plan.to_bytes())
    if experiment.clients.partition == "nodes":  # all are asked who they are, once
        plan_sent = roll_call_bytes(plan_length)
        draws = dataclasses.replace(draws, newcomers=float(draws.num_clients))
    else:
        plan_sent = request_bytes(round(down), plan, plan_length) - request_bytes(round(down), plan)
    dense = BYTES_PER_FLOAT * (layout.pretrained_parameters + layout.head_parameters)
    lora = BYTES_PER_FLOAT * (layout.lora_values + layout.head_parameters)
    measuring = _measuring(experiment, draws, plan, lengths)
    alone, down_alone, up_alone = (measuring[name] for name in MEASURING)
    total = len(parts) * (uplink + downlink) + draws.newcomers * plan_sent
    total += alone * (down_alone + up_alone) + measuring["evaluation_newcomers"] * plan_sent
    dense_total, lora_total = (2 * each * len(parts) for each in (dense, lora))
    tolerance = _tolerance(plan, draws)
    _explain(experiment, draws, tolerance, notes)

    def on(link: Link) -> dict[str, Any]:
        up, down = link.up.seconds, link.down.seconds
        seconds = {"plan": down(plan_sent), "down": down(downlink), "up": up(uplink)}
        seconds["round"] = seconds["down"] + seconds["up"]
        # A round waits for its clients, who send at the same time, each on a link of its own.
        seconds["run"] = len(draws.rounds) * seconds["round"] + seconds["plan"]
        once = down(down_alone) + up(up_alone)  # each client on a link of its own
        seconds["run"] += measuring["evaluations"] * once if alone else 0.0
        seconds |= {"lora_round": down(lora) + up(lora), "dense_round": down(dense) + up(dense)}
        return {
            **{name: getattr(link, name) for name in ("name", "title", "what")},
            "sources": list(link.sources),
            "up_bits_per_second": link.up.bits_per_second,
            "down_bits_per_second": link.down.bits_per_second,
            "duty_cycle": link.up.duty_cycle,
            **{f"{name}_seconds": each for name, each in seconds.items()},
        }

    return Estimate(
        run=_run(experiment, backbone, plan, draws),
        model=_model(experiment, layout, counts, draws),
        message={
            "up_payload_bytes": up,
            "up_frame_bytes": up + HEADER_BYTES,
            "up_bits_per_value": 8 * up / values,
            "down_frame_bytes": down,
            "down_bits_per_value": 8 * (down - HEADER_BYTES) / values,
            "down_first_round_frame_bytes": _mean(frames[0]),
            "plan_bytes": plan_length,
        },
        communication={
            "plan_bytes_per_client": plan_sent,
            "uplink_bytes": len(parts) * uplink + alone * up_alone,
            "downlink_bytes": len(parts) * downlink + alone * down_alone,
            "plan_bytes": (draws.newcomers + measuring["evaluation_newcomers"]) * plan_sent,
            "total_bytes": total,
            "uplink_bytes_per_client_round": uplink,
            "downlink_bytes_per_client_round": downlink,
            "dense_fedavg_total_bytes": dense_total,
            "ratio_to_dense": total / dense_total,
            "lora_total_bytes": lora_total,
            "ratio_to_lora": total / lora_total,
            **(measuring if alone else {}),
            **idle_bytes(),
        },
        links=[on(link) for link in links],
        tolerance=tolerance,
        notes=notes,
    )


MEASURING = ("evaluation_answers", "evaluation_down_bytes", "evaluation_up_bytes")


def _measuring(
    experiment: Experiment, draws: Draws, plan: Plan, lengths: Payloads
) -> dict[str, float]:
    """Count the messages by which clients measure the values outside of training.

    After the last round, and after every `clients.unseen-every`, those that never train; where the
    server has no rows, after the last round those that one more round would draw.
    """
    often, rounds = experiment.clients.unseen_every, len(draws.rounds)
    after = {rounds, *(range(0, rounds, often) if often else ())} if draws.unseen else set()
    at_end = len(draws.rounds[-1]) if experiment.data.eval_on == "clients" else 0
    down, up = measuring_bytes(round(float(lengths.down[-1, -1])) + HEADER_BYTES)
    by_nodes = experiment.clients.partition == "nodes"  # who are sent the plan as they register
    return {
        "evaluations": len(after | {rounds}) if at_end else len(after),
        "evaluation_newcomers": 0.0 if by_nodes else draws.unseen,
        **dict(zip(MEASURING, (draws.unseen * len(after) + at_end, down, up), strict=True)),
    }


def _run(experiment: Experiment, backbone: Backbone, plan: Plan, draws: Draws) -> dict[str, Any]:
    codec = experiment.codec
    return {
        "experiment": experiment.run.name,
        "seed": experiment.run.seed,
        "backbone": experiment.backbone.model,
        "architecture": type(backbone.model).__name__,
        "strategy": experiment.strategy.name,
        "codec_uplink": _named(codec.uplink, codec.head_uplink),
        "codec_downlink": _named(codec.downlink, codec.head_downlink),
        "downlink": "delta" if plan.is_delta_downlink else "full",
        "error_feedback": codec.error_feedback,
        "rounds": len(draws.rounds),
        "clients": draws.num_clients,
        "clients_per_round": max(map(len, draws.rounds)),
        "newcomers": draws.newcomers,
        "clients_are_the_data_s": draws.known,
    }


def _model(
    experiment: Experiment, layout: Layout, counts: Sequence[int], draws: Draws
) -> dict[str, Any]:
    mask = layout.values_by_kind.get("mask", 0)
    times = Counter(taker.tier for takers in draws.rounds for taker in takers)
    tiers = [
        {"density": density, "values": count, "parts": times[tier]}
        for tier, (density, count) in enumerate(
            zip(experiment.mask.tier_densities, counts, strict=True)
        )
    ]
    return {
        "backbone_parameters": layout.pretrained_parameters,
        "communicated_values": layout.num_values,
        "mask_values": mask,
        "structure_values": layout.num_values - mask - layout.head_parameters,
        "head_values": layout.head_parameters,
        "values_by_kind": layout.values_by_kind,
        "mask_scope_entries": sum(layout.scope),
        "lora_values": layout.lora_values,
        "lora_rank": LORA_RANK,
        "tiers": tiers if len(tiers) > 1 else [],
    }


def _census(
    experiment: Experiment, num_clients: int | None, rows_per_client: int | None, notes: list[str]
) -> ClientCounts | None:
    """Count the data's clients; None where the user or the configuration says their number."""
    if num_clients is not None:
        if num_clients < 1 or (rows_per_client is not None and rows_per_client < 1):
            raise ConfigError(
                f"--clients and --rows must be at least 1, got {num_clients} and {rows_per_client}."
            )
        return None
    if rows_per_client is not None:
        raise ConfigError(
            "--rows is for an estimate without the data: give the number of clients, --clients, "
            "with it, or leave it out."
        )
    try:
        return count_clients(experiment.data, experiment.clients, cache=make_cache(experiment))
    except DataError as error:
        if experiment.clients.partition == "column":
            raise DataError(
                f"the clients cannot be counted: {str(error).rstrip('.')}. To estimate without "
                "the data, give their number by --clients."
            ) from None
        notes.append(f"The data were not read, so clients.num-clients counts ({error})")
        return None


def _assumed_task(experiment: Experiment, notes: list[str]) -> Task:
    data = experiment.data
    labels = data.label_names
    if kind_of(data.task).has_classes and not labels:
        labels = ("0", "1")
        notes.append("Two classes are assumed; data.label-names tells others.")
    return Task(data.task, labels, data.metric)


def _named(codec: str, of_head: str) -> str:
    return codec if of_head in ("", codec) else f"{codec}, head {of_head}"


def _mean(numbers: Iterable[float]) -> float:
    return float(np.mean(list(numbers)))


def _tolerance(plan: Plan, draws: Draws) -> float:
    codec, training = plan.codec, plan.training
    names = (codec.uplink, codec.downlink, codec.head_uplink, codec.head_downlink)
    if is_fixed(*names) and not plan.is_delta_downlink and draws.known:
        return 0.0
    steps = [local_steps(taker.num_rows, training) for takers in draws.rounds for taker in takers]
    parsed = [parse_codec(name) for name in names if name]
    has_tails = any(codec.topk_ppm or codec.base in GRIDS for codec in parsed)
    return max(
        _TOLERANCE if draws.known else _TOLERANCE_OF_ROWS,
        _TOLERANCE_OF_TAILS * has_tails,
        _TOLERANCE_OF_ONE_STEP * steps.count(1) / len(steps),
    )


def _explain(experiment: Experiment, draws: Draws, tolerance: float, notes: list[str]) -> None:
    if draws.known:
        notes.append(
            f"The clients of each round are those that seed {experiment.run.seed} draws from the "
            "data; every one of them answers."
        )
    else:
        notes.append(
            f"Clients are taken to hold {draws.rounds[0][0].num_rows:,} rows each, and all to "
            "answer; a run whose clients hold others, or that has other classes, is another one. "
            "How many need the plan is an expectation, over draws without replacement in each "
            "round."
        )
    if tolerance:
        notes.append(
            "Lengths behind an entropy stage are those of made-up updates: this optimiser and "
            "strategy, these learning rates and steps, random gradients. In total within about "
            f"{tolerance:.0%} of {'a run' if draws.known else 'such a run'}'s."
        )
    if experiment.clients.partition == "nodes":
        notes.append("Every client there is, is sent the plan: nodes are asked who lives on them.")
    if experiment.mask.enabled and experiment.mask.broadcast == "send":
        notes.append(
            "The explicit mask is reckoned as equally dense everywhere, which is the dearest; a "
            "real one is coded in a few percent less."
        )
    notes.append("Dense FedAvg and LoRA: 4 bytes a parameter, same rounds, no framing.")
