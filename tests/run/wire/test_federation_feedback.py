"""Error feedback over whole runs: that of a plain simulation, for four bytes a client."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from modelless import (
    CLIENTS,
    NUM_VALUES,
    NUMBERS,
    ROWS,
    SEED,
    FakeNode,
    FakePet,
    make_plan,
    make_strategy,
    node_settings,
    start,
)
from sending import codec_of
from wire_runs import FEEDBACK

from fedpet.protocol.codec_seeds import uplink_seeds
from fedpet.protocol.frame import Frame, pack_frame, unpack_frames
from fedpet.protocol.request import read_request, write_request
from fedpet.utils.seeds import client_id64, derive_seed


def test_error_feedback_is_that_of_a_plain_simulation_also_when_a_round_is_not_accepted(
    tmp_path: Path,
) -> None:
    """Numpy alone: residuals in a dict, a round below its quorum and a frame lost on its way."""
    plan = make_plan(FEEDBACK)
    coding = plan.uplink([(0, 320), (320, 360), (360, 420)], [(360, 420)])
    node = FakeNode(node_settings(tmp_path))
    lost = {2: set(CLIENTS[:6]), 4: {CLIENTS[1]}}  # the 2nd round misses its quorum

    def lossy(payload: bytes) -> bytes:
        whole = node.answer(payload)
        frames = list(unpack_frames(whole, max_frames=9, max_payload_bytes=1 << 20))
        kept = [f for f in frames if NUMBERS[f.client] not in lost.get(f.server_round, ())]
        return b"".join(pack_frame(frame) for frame in kept if isinstance(frame, Frame))

    strategy = make_strategy(plan, clients_per_round=8)
    values = start(strategy, {1: lossy}, 6)
    expected = np.zeros(NUM_VALUES, dtype=np.float32)
    residuals: dict[str, np.ndarray] = {}
    pet = FakePet(plan)
    for server_round in range(1, 7):
        left, total, weight = {}, np.zeros(NUM_VALUES), 0
        for name in CLIENTS:
            number = client_id64(name)
            seed = derive_seed("client", SEED, server_round, number)
            pet.set_delta(torch.from_numpy(expected), seed=seed)
            pet.train(number, seed)
            wanted = pet.get_delta().numpy() - expected
            if name in residuals:
                wanted = wanted + residuals[name]
            seeds = uplink_seeds(SEED, server_round, number)
            decoded = coding.decode(coding.encode(wanted, **seeds), **seeds)
            if name in lost.get(server_round, ()):
                continue
            left[name] = wanted - decoded
            total += ROWS[name] * decoded.astype(np.float64)
            weight += ROWS[name]
        if server_round != 2:
            residuals |= left
            expected = (expected.astype(np.float64) + total / weight).astype(np.float32)
    assert values.tobytes() == expected.tobytes()
    assert not strategy.ledger.rounds[1].aggregated


def test_with_error_feedback_top_k_comes_nearer_to_what_was_meant(run: Any) -> None:
    everyone = {"clients_per_round": 8, "rounds": 30}
    meant, _, _ = run(codec_of(), **everyone)
    fed, _, _ = run(FEEDBACK, **everyone)
    bare, _, _ = run(codec_of(uplink="topk-0.1+eden-4"), **everyone)
    assert np.linalg.norm(fed - meant) < 0.7 * np.linalg.norm(bare - meant)


def test_nothing_of_the_clients_state_is_in_messages_but_a_number_a_client(run: Any) -> None:
    # Raw values, coded anew each round: all frames of a direction are of one length.
    plain = codec_of(uplink="topk-0.1+int8-raw", downlink="bfloat16-raw", downlink_mode="full")
    _, _, fed = run(replace(plain, error_feedback=True), rounds=4)
    _, _, bare = run(plain, rounds=4)
    # 8 for the run, and the last accepted round of each client, a byte up to 127; the first has the
    # plan, whose words differ.
    assert [a - b for a, b in zip(fed[1:], bare[1:], strict=True)] == [8 + 5] * 3


def test_a_request_that_names_a_round_to_come_is_refused(tmp_path: Path) -> None:
    node = FakeNode(node_settings(tmp_path))
    changed = []

    def forward(payload: bytes) -> bytes:
        asked = read_request(payload)
        changed.append(
            write_request(msgspec.structs.replace(asked, accepted=(9,) * len(asked.clients)))
        )
        return node.answer(changed[-1])

    strategy = make_strategy(make_plan(FEEDBACK))
    start(strategy, {1: forward}, 1)
    assert all("must be before this one" in r["reason"] for r in strategy.ledger.rounds[0].refused)
    assert len(strategy.ledger.rounds[0].refused) == 5
