"""What a run costs: every message's bytes, their sum, and the seconds they take.

    outline -> layout -> updates -> messages -> [cost]

In:  an experiment, and where its data are not at hand the number of its clients.
Out: an `Estimate`, in the terms of a run's `result.json`.

Every sampled client is taken to answer. Where the data can be read, the clients of each round are
the very ones that the run's seed draws; else all hold the same number of rows, and the number of
those that need the plan is an expectation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from fedpet.client import cache_folder
from fedpet.codec import check_codec
from fedpet.codec.frame import HEADER_BYTES
from fedpet.codec.integers import GRIDS
from fedpet.codec.names import parse_codec
from fedpet.config import CodecConfig, Experiment
from fedpet.data import Census, Task, take_census
from fedpet.data.task import check_label_names
from fedpet.errors import ConfigError, DataError
from fedpet.estimate.layout import LORA_RANK, Layout, lay_out
from fedpet.estimate.links import LINKS, Link
from fedpet.estimate.messages import plan_bytes, reply_bytes, request_bytes
from fedpet.estimate.outline import outline
from fedpet.estimate.updates import is_fixed, local_steps, payloads
from fedpet.population import Population

__all__ = ["Draws", "Estimate", "estimate"]

SCHEMA = 1
BYTES_PER_FLOAT = 4
ROWS_PER_CLIENT = 32  # where neither the data nor the user say

# How far a payload may be from a run's, as a fraction. Measured on real runs, see the tests.
_TOLERANCE = 0.01
_TOLERANCE_OF_ROWS = 0.03  # where clients are assumed to hold the same number of rows
_TOLERANCE_OF_TAILS = 0.05  # top-k, and scales of blocks under SGD: the largest values decide
_TOLERANCE_OF_ONE_STEP = 0.2  # of the updates of clients that take a single step


@dataclass(frozen=True)
class Draws:
    """Who takes part.

    Attributes:
        num_clients: There are.
        rows: For each round the rows that each of its clients holds.
        newcomers: Clients that take part at least once: each is sent the plan. An expectation
            where the clients are not known.
        known: Whether the clients are the data's, drawn by the run's seed.
    """

    num_clients: int
    rows: Sequence[Sequence[int]]
    newcomers: float
    known: bool


@dataclass(frozen=True)
class Estimate:
    """A run's cost. Bytes are those of whole messages; MB is 10^6 bytes.

    Attributes:
        run: What was estimated: names, codecs, rounds, clients.
        model: Parameters and values, as `result.json` has them.
        message: Mean lengths from the payload to the whole message, up and down, and the plan.
        communication: The run's bytes, under the names that `result.json` gives them; and those
            of LoRA beside it.
        links: For each link the seconds of a client's messages.
        tolerance: How far the bytes may be from a run's, as a fraction; 0 where every payload
            has one length.
        notes: What was assumed, a sentence each.
    """

    run: dict[str, Any]
    model: dict[str, Any]
    message: dict[str, Any]
    communication: dict[str, Any]
    links: list[dict[str, Any]]
    tolerance: float
    notes: list[str]

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
    """Say what a run would cost.

    Args:
        experiment: The run. Its backbone may be a configuration without weights.
        num_clients: How many clients there are; None counts them in the data.
        rows_per_client: That each of them holds; only with `num_clients`.
        links: Whose seconds to tell.

    Raises:
        InputError: The configuration, the codecs, the structure or the data cannot be used.
    """
    if experiment.search.federated:
        raise ConfigError(
            "an estimate foresees the rounds of a structure that is known, and search.federated "
            "finds it in the run: estimate with search.federated = false and a preset or file of "
            "the same size."
        )
    check_codec(experiment.codec.up)
    check_codec(experiment.codec.down)
    check_label_names(experiment.data)
    _check_downlink(experiment.codec)
    notes: list[str] = []
    census = _census(experiment, num_clients, rows_per_client, notes)
    task = census.task if census else _assumed_task(experiment, notes)
    draws = _draw(experiment, census, num_clients, rows_per_client)
    backbone = outline(
        experiment.backbone, num_outputs=task.num_outputs, regression=task.kind == "regression"
    )
    layout = lay_out(backbone, experiment)
    kinds = _groups(layout)
    lengths = payloads(kinds, experiment.training, experiment.codec, draws.rows)
    per_round = np.array([len(rows) for rows in draws.rows])  # clients, (rounds,)
    taking_part = int(per_round.sum())
    up = float(lengths.up @ per_round / taking_part)
    down = float(lengths.down @ per_round / taking_part)
    plan = plan_bytes(experiment, layout, task)
    uplink, downlink = up + _framing_up(up), down + _framing_down(down)
    plan_sent = request_bytes(round(down), plan) - request_bytes(round(down))
    dense = BYTES_PER_FLOAT * (layout.pretrained_parameters + layout.head_parameters)
    lora = BYTES_PER_FLOAT * (layout.lora_values + layout.head_parameters)
    total = taking_part * (uplink + downlink) + draws.newcomers * plan_sent
    tolerance = _tolerance(experiment, draws)
    _explain(experiment, draws, tolerance, notes)
    return Estimate(
        run={
            "experiment": experiment.run.name,
            "seed": experiment.run.seed,
            "backbone": experiment.backbone.model,
            "architecture": type(backbone.model).__name__,
            "codec_up": experiment.codec.up,
            "codec_down": experiment.codec.down,
            "rounds": len(draws.rows),
            "clients": draws.num_clients,
            "clients_per_round": int(per_round.max()),
            "newcomers": draws.newcomers,
            "clients_are_the_data_s": draws.known,
        },
        model={
            "backbone_parameters": layout.pretrained_parameters,
            "communicated_values": layout.num_values,
            "mask_values": layout.values_by_kind.get("mask", 0),
            "structure_values": layout.num_values
            - layout.values_by_kind.get("mask", 0)
            - layout.head_parameters,
            "head_values": layout.head_parameters,
            "values_by_kind": layout.values_by_kind,
            "mask_scope_entries": sum(layout.scope),
            "lora_values": layout.lora_values,
            "lora_rank": LORA_RANK,
        },
        message={
            "up_payload_bytes": up,
            "up_frame_bytes": up + HEADER_BYTES,
            "up_bits_per_value": 8 * up / layout.num_values,
            "down_payload_bytes": down,
            "down_frame_bytes": down + HEADER_BYTES,
            "down_bits_per_value": 8 * down / layout.num_values,
            "down_first_round_payload_bytes": float(lengths.down[0]),
            "plan_bytes": plan,
        },
        communication={
            "plan_bytes_per_client": plan_sent,
            "uplink_bytes": taking_part * uplink,
            "downlink_bytes": taking_part * downlink,
            "plan_bytes": draws.newcomers * plan_sent,
            "total_bytes": total,
            "uplink_bytes_per_client_round": uplink,
            "downlink_bytes_per_client_round": downlink,
            "dense_fedavg_total_bytes": 2 * dense * taking_part,
            "ratio_to_dense": total / (2 * dense * taking_part),
            "lora_total_bytes": 2 * lora * taking_part,
            "ratio_to_lora": total / (2 * lora * taking_part),
        },
        links=[
            _seconds(link, uplink, downlink, plan_sent, len(draws.rows), dense, lora)
            for link in links
        ],
        tolerance=tolerance,
        notes=notes,
    )


def _check_downlink(codec: CodecConfig) -> None:
    """Refuse what cannot be foreseen yet: changes of a reference, the head's own codec."""
    if not codec.down.startswith("float32") and codec.downlink != "values":
        raise ConfigError(
            f"an estimate foresees a lossy codec.down, here {codec.down!r}, where each round codes "
            'the values anew: set codec.downlink = "values". What changes of a reference cost '
            "depends on who comes again."
        )
    if codec.head_up or codec.head_down:
        raise ConfigError(
            "an estimate foresees one codec for all values: leave codec.head-up and "
            "codec.head-down empty."
        )


def _census(
    experiment: Experiment, num_clients: int | None, rows_per_client: int | None, notes: list[str]
) -> Census | None:
    """The data's clients; None where the user tells their number, or the configuration does."""
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
        return take_census(experiment.data, experiment.population, cache=cache_folder(experiment))
    except DataError as error:
        if experiment.population.partition == "column":
            raise DataError(
                f"the clients cannot be counted: {str(error).rstrip('.')}. To estimate without "
                "the data, give their number by --clients."
            ) from None
        notes.append(f"The data were not read, so population.num-clients counts ({error})")
        return None


def _assumed_task(experiment: Experiment, notes: list[str]) -> Task:
    data = experiment.data
    labels = data.label_names
    if data.task == "classification" and not labels:
        labels = ("0", "1")
        notes.append("Two classes are assumed; data.label-names tells others.")
    return Task(data.task, labels, data.metric)


def _draw(
    experiment: Experiment,
    census: Census | None,
    num_clients: int | None,
    rows_per_client: int | None,
) -> Draws:
    """Draw every round's clients as the run would, or as many of one size."""
    strategy = experiment.strategy
    if census is not None:
        population = Population(census.num_rows, homes={})
        drawn = [
            population.sample(server_round, strategy.clients_per_round, experiment.run.seed)
            for server_round in range(1, strategy.num_rounds + 1)
        ]
        return Draws(
            num_clients=len(census.num_rows),
            rows=[[census.num_rows[name] for name in names] for names in drawn],
            newcomers=len({name for names in drawn for name in names}),
            known=True,
        )
    num_clients = num_clients or experiment.population.num_clients
    taking_part = min(strategy.clients_per_round, num_clients)
    rows = [rows_per_client or ROWS_PER_CLIENT] * taking_part
    never = (1 - taking_part / num_clients) ** strategy.num_rounds  # the odds of one client
    return Draws(
        num_clients=num_clients,
        rows=[rows] * strategy.num_rounds,
        newcomers=num_clients * (1 - never),
        known=False,
    )


def _groups(layout: Layout) -> list[tuple[str, int]]:
    """Kind and size of what a codec scales apart: neighbouring segments of one kind."""
    return [
        (kind, sum(segment.size for segment in segments))
        for kind, segments in groupby(layout.segments, key=lambda segment: segment.kind)
    ]


def _framing_up(payload: float) -> int:
    return reply_bytes(round(payload)) - round(payload)


def _framing_down(payload: float) -> int:
    return request_bytes(round(payload)) - round(payload)


def _seconds(
    link: Link,
    uplink: float,
    downlink: float,
    plan: float,
    num_rounds: int,
    dense: float,
    lora: float,
) -> dict[str, Any]:
    """What a client's messages take on one link."""
    up, down = link.up.seconds(uplink), link.down.seconds(downlink)
    return {
        "name": link.name,
        "title": link.title,
        "what": link.what,
        "sources": list(link.sources),
        "up_bits_per_second": link.up.bits_per_second,
        "down_bits_per_second": link.down.bits_per_second,
        "duty_cycle": link.up.duty_cycle,
        "plan_seconds": link.down.seconds(plan),
        "down_seconds": down,
        "up_seconds": up,
        "round_seconds": down + up,
        # A round waits for its clients, who send at the same time, each on a link of its own.
        "run_seconds": num_rounds * (down + up) + link.down.seconds(plan),
        "lora_round_seconds": link.down.seconds(lora) + link.up.seconds(lora),
        "dense_round_seconds": link.down.seconds(dense) + link.up.seconds(dense),
    }


def _tolerance(experiment: Experiment, draws: Draws) -> float:
    if is_fixed(experiment.codec.up) and is_fixed(experiment.codec.down):
        return 0.0
    steps = [local_steps(rows, experiment.training) for each in draws.rows for rows in each]
    single = sum(count == 1 for count in steps) / len(steps)
    least = _TOLERANCE if draws.known else _TOLERANCE_OF_ROWS
    codecs = [parse_codec(name) for name in (experiment.codec.up, experiment.codec.down)]
    by_tails = any(
        codec.top_ppm or (codec.base in GRIDS and experiment.training.optimizer == "sgd")
        for codec in codecs
    )
    return max(least, _TOLERANCE_OF_TAILS * by_tails, _TOLERANCE_OF_ONE_STEP * single)


def _explain(experiment: Experiment, draws: Draws, tolerance: float, notes: list[str]) -> None:
    if draws.known:
        notes.append(
            f"The clients of each round are those that seed {experiment.run.seed} draws from the "
            "data; every one of them answers."
        )
    else:
        notes.append(
            f"Clients are taken to hold {draws.rows[0][0]:,} rows each, and all to answer. How "
            "many need the plan is an expectation, over draws without replacement in each round."
        )
    if tolerance:
        notes.append(
            "Lengths behind an entropy stage are those of made-up updates: this optimiser, these "
            f"learning rates and steps, random gradients. In total within about {tolerance:.0%} "
            "of a run's."
        )
    if experiment.mask.enabled and experiment.mask.broadcast == "explicit":
        notes.append(
            "The explicit mask is reckoned as equally dense everywhere, which is the dearest; a "
            "real one is coded in a few percent less."
        )
    notes.append("Dense FedAvg and LoRA: 4 bytes a parameter, same rounds, no framing.")
