"""Measure the server's memory by clients of a round: replies, decoding, averaging.

    python -m benchmarks.server_memory --out server_memory.json

In:  a number of values, a codec, a rule, numbers of clients a round.
Out: the peak of a process's resident memory over rounds with so many clients, in MB (10^6), and
     what each number of clients adds to the first.

There is no model and no training: each client's frame holds Gaussian noise, which no codec can
shorten. The frames are made in the same process, a node at a time, and lie on disk until the server
asks for them, as those of real nodes lie with the SuperLink. Linux only: the peak is the kernel's.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Message

from benchmarks.peak_memory import peak_bytes
from fedpet.codec import encode_values, parse_codec
from fedpet.config import CodecConfig, StrategyConfig, TrainingConfig
from fedpet.data import Task
from fedpet.pet.structure import Structure
from fedpet.pet.tiers import Tier
from fedpet.protocol.codec_seeds import uplink_seeds
from fedpet.protocol.flower_compat.flower_messages import set_message_id
from fedpet.protocol.flower_compat.flower_simulation import quiet_flower
from fedpet.protocol.frame import Frame, pack_frame, unpack_frames
from fedpet.protocol.ledger import Ledger
from fedpet.protocol.plan import Plan
from fedpet.protocol.request import from_record, read_request, to_record
from fedpet.run.local_grid import LocalGrid
from fedpet.run.run_folder import machine, versions
from fedpet.server.aggregation import to_arrays
from fedpet.server.client_pool import ClientPool
from fedpet.server.reply_stream import SpooledPayloads
from fedpet.server.rounds import SparseStrategy
from fedpet.utils.seeds import derive_seed

SEED = 0


def make_plan(num_values: int, codec: str) -> Plan:
    """Make a plan of so many values that belongs to no model."""
    return Plan(
        fingerprint="",
        head_seed=0,
        task=Task("classification", ("0", "1"), "accuracy"),
        max_length=8,
        tokenizer_hash="",
        mask=None,
        mask_sha256="",
        mask_positions=b"",
        structure=Structure(()),
        num_values=num_values,
        layout="",
        codec=CodecConfig(uplink=codec),
        training=TrainingConfig(learning_rate=1e-3),
        num_rounds=1,
        seed=SEED,
    )


def answer(payload: bytes, plan: Plan) -> bytes:
    """Answer as a node: noise for each client of its cohort."""
    request = read_request(payload)
    wanted = next(unpack_frames(request.frame, max_frames=1, max_payload_bytes=len(payload)))
    assert isinstance(wanted, Frame)
    frames = bytearray()
    for client in request.clients:
        seed = derive_seed("client", SEED, wanted.server_round, client)
        values = np.random.default_rng(seed).normal(size=plan.num_values).astype(np.float32)
        groups = [(0, plan.num_values)]
        encoded = encode_values(
            values, plan.codec.uplink, groups, **uplink_seeds(SEED, wanted.server_round, client)
        )
        frames += pack_frame(
            Frame(
                plan_digest=wanted.plan_digest,
                server_round=wanted.server_round,
                client=client,
                codec=plan.codec.uplink,
                count=plan.num_values,
                num_examples=1,
                loss=0.0,
                train_seconds=0.0,
                payload=encoded,
            )
        )
    return bytes(frames)


class PostOffice(LocalGrid):
    """Hold replies outside the server's memory until they are pulled."""

    def __init__(self, handlers: dict[int, Callable[[bytes], bytes]]) -> None:
        super().__init__(handlers)
        self._shelf = SpooledPayloads()
        self._asked: dict[str, tuple[Message, tuple[int, int]]] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Answer at once, and put the answer away."""
        numbers = []
        for message in messages:
            number = f"message-{len(self._asked)}"
            set_message_id(message, number)
            reply = self._handlers[message.metadata.dst_node_id](from_record(message.content))
            message.content.clear()
            self._asked[number] = message, self._shelf.put(reply)
            numbers.append(number)
        return numbers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Make the replies to these messages."""
        wanted = [self._asked.pop(number) for number in message_ids]
        return [Message(to_record(self._shelf.get(place)), reply_to=m) for m, place in wanted]


def peak_mb(strategy: str, codec: str, num_values: int, num_clients: int, rounds: int) -> float:
    """Run rounds of so many clients; the peak of this process's memory, since it began."""
    plan = make_plan(num_values, codec)
    made = SparseStrategy(
        plan=plan,
        tiers=[Tier(0.0, 1.0, slice(None), num_values, [(0, num_values)])],
        population=ClientPool({f"client {n}": 1 for n in range(num_clients)}, homes={}),
        config=StrategyConfig(name=strategy, clients_per_round=num_clients, quorum=1.0),
        ledger=Ledger(),
    )
    nodes = range(1, num_clients + 1)  # one client each, as devices are
    grid = PostOffice({node: lambda payload: answer(payload, plan) for node in nodes})
    with quiet_flower():
        made.start(grid, to_arrays(np.zeros(num_values)), num_rounds=rounds)
    assert all(record.aggregated for record in made.ledger.rounds)
    return peak_bytes() / 1e6


def _in_a_process(*arguments: Any) -> float:
    """`peak_mb` in a process of its own, which has held nothing before."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak_mb, arguments)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.server_memory")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--strategies", nargs="+", default=["fedavg", "fedadam", "fedmedian"])
    parser.add_argument("--codecs", nargs="+", default=["float32", "int8"])
    parser.add_argument("--values", type=int, default=89_870)  # of the default job
    parser.add_argument("--clients", type=int, nargs="+", default=[20, 200])
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for strategy in given.strategies:
        for codec in given.codecs:
            parse_codec(codec)
            peaks = {
                str(clients): _in_a_process(strategy, codec, given.values, clients, given.rounds)
                for clients in given.clients
            }
            first = peaks[str(given.clients[0])]
            added = {clients: peak - first for clients, peak in peaks.items()}
            rows.append({"strategy": strategy, "codec": codec, "peak_mb": peaks, "added_mb": added})
            shown = ", ".join(f"{clients} clients {peak:.0f} MB" for clients, peak in peaks.items())
            print(f"{strategy} {codec}: {shown}", file=sys.stderr, flush=True)
    result = {
        "schema": 1,
        "values": given.values,
        "rounds": given.rounds,
        "rows": rows,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "versions": versions(),
        "machine": machine(),
    }
    text = json.dumps(result, indent=2) + "\n"
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
