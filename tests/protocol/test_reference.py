"""The public reference: the same bits by every path, near the values, never longer than need be."""

from __future__ import annotations

from pathlib import Path as FilePath

import numpy as np
import pytest
from modelless import NUM_VALUES, SEED, TWO_TIERS, FakePet, make_plan
from sending import codec_of

from fedpet.client.global_values import decode_global_values, frames_by_tier
from fedpet.client.state_store import StateStore, state_folder
from fedpet.config import CodecConfig, MaskConfig
from fedpet.errors import FrameError, PlanError, RunError
from fedpet.pet.tiers import tiers_of
from fedpet.protocol.frame import Frame, pack_frame, unpack_frames
from fedpet.protocol.plan import Plan
from fedpet.protocol.request import Path, Request
from fedpet.server.downlink import Changes, Sent, Values, downlink_of

LOSSY = codec_of(downlink="eden-4")


def server(codec: CodecConfig = LOSSY, mask: MaskConfig | None = None) -> tuple[Plan, Changes]:
    plan = make_plan(codec, mask)
    tiers = tiers_of(FakePet(plan), plan.mask)
    downlink = downlink_of(plan, Plan.digest(plan.to_bytes()), tiers)
    assert isinstance(downlink, Changes)
    return plan, downlink


def request(*sent: Sent) -> Request:
    paths = tuple(part.path for part in sent if part.path is not None)
    return Request((1,), b"".join(part.frames for part in sent), run=5, paths=paths)


def receive(plan: Plan, asked: Request, state: StateStore) -> list[np.ndarray]:
    starts = decode_global_values(asked, frames_by_tier(asked), plan, FakePet(plan), state)
    return [start.values for start in starts]


def walk(num_rounds: int, size: float = 1.0) -> list[np.ndarray]:
    """Global values of a run: zeros, then steps that grow smaller."""
    random = np.random.default_rng(3)
    steps = [size * random.normal(size=NUM_VALUES) / (1 + t) for t in range(num_rounds - 1)]
    return list(np.cumsum([np.zeros(NUM_VALUES), *steps], axis=0).astype(np.float32))


@pytest.mark.parametrize(
    ("codec", "mask"),
    [
        (LOSSY, None),
        (LOSSY, TWO_TIERS),
        (codec_of(downlink="topk-0.1+eden-2", head_downlink="bfloat16"), TWO_TIERS),
        (codec_of(downlink="float32", head_downlink="int8"), None),
    ],
)
def test_whoever_held_what_starts_from_the_same_bits(
    codec: CodecConfig, mask: MaskConfig | None, tmp_path: FilePath
) -> None:
    plan, downlink = server(codec, mask)
    random = np.random.default_rng(1)
    tiers = len(FakePet(plan).tiers)
    devices = [[StateStore(tmp_path / f"{tier}-{d}") for d in range(6)] for tier in range(tiers)]
    held = [[0] * 6 for _ in range(tiers)]
    paths = set()
    for server_round, values in enumerate(walk(25), start=1):
        downlink.begin(server_round, values)
        for tier in range(tiers):
            newcomer = StateStore(tmp_path / f"new-{tier}-{server_round}")
            seen = {receive(plan, request(downlink.to(tier, 0)), newcomer)[0].tobytes()}
            for device in range(6):
                if random.random() < 0.5 and device:  # device 0 is there each time
                    continue
                sent = downlink.to(tier, held[tier][device])
                if random.random() < 0.3:  # another process of the same device
                    devices[tier][device] = StateStore(tmp_path / f"{tier}-{device}")
                [start] = receive(plan, request(sent), devices[tier][device])
                seen.add(start.tobytes())
                held[tier][device] = server_round
                assert sent.path is not None
                paths.add(min(sent.path.changes, 3))
            assert len(seen) == 1, (server_round, tier)
    assert len(paths) > 1


def test_a_receiver_is_sent_the_changes_it_missed_or_the_reference_whichever_is_shorter() -> None:
    _, downlink = server()
    chosen = []
    for server_round, values in enumerate(walk(30), start=1):
        downlink.begin(server_round, values)
        newcomer, holder = downlink.to(0, 0), downlink.to(0, server_round - 1)
        assert newcomer.path is not None
        assert holder.path is not None
        chosen.append(newcomer.path.changes)
        assert holder.path.changes == 1
        parts = list(unpack_frames(newcomer.frames, max_frames=40, max_payload_bytes=1 << 20))
        assert len(parts) == max(newcomer.path.changes, 1)
    assert chosen[:3] == [1, 2, 3]
    assert chosen[-1] == 0
    whole = len(downlink.to(0, 0).frames)
    for held in range(29):
        assert len(downlink.to(0, held).frames) <= whole


@pytest.mark.parametrize("codec", ["eden-1", "eden-2", "int4", "topk-0.1+eden-4", "bfloat16"])
def test_the_reference_never_drifts_from_the_values(codec: str, tmp_path: FilePath) -> None:
    """Its error is that of the last changes: 50 rounds on it is no larger, and ends when they do.

    Top-k of a tenth sends of a steady change so little that it takes longer.
    """
    plan, downlink = server(codec_of(downlink=codec))
    state = StateStore(tmp_path)
    random = np.random.default_rng(0)
    values, errors = np.zeros(NUM_VALUES, dtype=np.float32), []
    for server_round in range(1, 101):
        downlink.begin(server_round, values)
        [reference] = receive(plan, request(downlink.to(0, server_round - 1)), state)
        errors.append(float(np.linalg.norm(reference - values)))
        if server_round <= 50:
            values = values + random.normal(size=NUM_VALUES).astype(np.float32)
    bound = {"eden-1": 1.6, "topk-0.1+eden-4": 8}.get(codec, 1.0) * NUM_VALUES**0.5
    assert max(errors) < bound
    assert max(errors[30:50]) < 1.5 * max(errors[:30])
    assert errors[-1] < 0.05 * max(errors)


def test_the_reference_is_a_plain_sum_of_decoded_changes(tmp_path: FilePath) -> None:
    plan, downlink = server()
    state, expected = StateStore(tmp_path), np.zeros(NUM_VALUES, dtype=np.float32)
    coding = plan.downlink([(0, 320), (320, 360), (360, 420)], [(360, 420)])
    for server_round, values in enumerate(walk(8), start=1):
        from fedpet.utils.seeds import derive_seed

        seed = derive_seed("downlink", SEED, server_round)
        change = coding.decode(coding.encode(values - expected, seed=seed), seed=seed)
        expected = expected + change
        downlink.begin(server_round, values)
        [start] = receive(plan, request(downlink.to(0, server_round - 1)), state)
        assert start.tobytes() == expected.tobytes()


def test_a_server_that_goes_on_from_its_journal_sends_the_same_bytes() -> None:
    values = walk(12)
    _, straight = server(mask=TWO_TIERS)
    _, before = server(mask=TWO_TIERS)
    for server_round in range(1, 13):
        straight.begin(server_round, values[server_round - 1])
        if server_round == 7:
            _, after = server(mask=TWO_TIERS)
            after.load_state(before.state())
            before = after
        before.begin(server_round, values[server_round - 1])
        for held in range(server_round):
            assert before.to(1, held) == straight.to(1, held)
            assert before.to(0, held) == straight.to(0, held)


def test_a_journal_of_another_plan_is_refused() -> None:
    _, downlink = server()
    downlink.begin(1, walk(1)[0])
    _, other = server(codec_of(downlink="eden-3"))
    with pytest.raises(RunError, match="another plan"):
        other.load_state(downlink.state())
    with pytest.raises(RunError, match="journal"):
        other.begin(3, walk(1)[0])


def test_values_that_lose_nothing_are_sent_as_they_are() -> None:
    for codec in (codec_of(), codec_of(downlink="float32-raw", head_downlink="float32")):
        plan = make_plan(codec)
        assert not plan.is_delta_downlink
        assert isinstance(downlink_of(plan, b"", tiers_of(FakePet(plan), None)), Values)
    assert not make_plan(codec_of(downlink="int8", downlink_mode="full")).is_delta_downlink
    assert make_plan(codec_of(head_downlink="int8")).is_delta_downlink


# -- what a node refuses ---------------------------------------------------------------------


def three_rounds() -> tuple[Plan, Changes]:
    plan, downlink = server()
    for server_round, values in enumerate(walk(3), start=1):
        downlink.begin(server_round, values)
    return plan, downlink


def test_a_node_without_the_reference_says_so(tmp_path: FilePath) -> None:
    plan, downlink = three_rounds()
    with pytest.raises(PlanError, match="reference that the changes"):
        receive(plan, request(downlink.to(0, 2)), StateStore(tmp_path))


def test_a_damaged_reference_is_no_reference(tmp_path: FilePath) -> None:
    plan, downlink = server()
    values = walk(2)
    downlink.begin(1, values[0] + 1)
    receive(plan, request(downlink.to(0, 0)), StateStore(tmp_path))
    downlink.begin(2, values[1])
    file = tmp_path / "reference-0"
    whole = file.read_bytes()
    random = np.random.default_rng(0)
    for _ in range(40):
        wrong = bytearray(whole)
        wrong[random.integers(len(wrong))] ^= 1 << int(random.integers(8))
        if bytes(wrong[5:8]) != b"\0\0\0":
            continue  # reserved bytes are covered by the checksum too
        file.write_bytes(wrong)
        with pytest.raises(PlanError, match="reference that the changes"):
            receive(plan, request(downlink.to(0, 1)), StateStore(tmp_path))
    for wrong in (b"", whole[:-1], whole + b"\0"):
        file.write_bytes(wrong)
        with pytest.raises(PlanError, match="reference that the changes"):
            receive(plan, request(downlink.to(0, 1)), StateStore(tmp_path))
    file.write_bytes(whole)
    assert receive(plan, request(downlink.to(0, 1)), StateStore(tmp_path))


def test_a_reference_that_does_not_check_is_not_trained_from(tmp_path: FilePath) -> None:
    plan, downlink = three_rounds()
    sent = downlink.to(0, 0)
    assert sent.path is not None
    wrong = Sent(sent.frames, Path(sent.path.changes, sent.path.checksum ^ 1))
    with pytest.raises(PlanError, match="reference that the changes"):
        receive(plan, request(wrong), StateStore(tmp_path))
    line = downlink._lines[0]
    whole = Sent(line._packed_whole(), Path(0, sent.path.checksum ^ 1))
    with pytest.raises(FrameError, match="checksum"):
        receive(plan, request(whole), StateStore(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_frames_with_a_gap_of_another_plan_or_count_are_refused() -> None:
    _, downlink = three_rounds()
    frames = list(unpack_frames(downlink.to(0, 0).frames, max_frames=9, max_payload_bytes=1 << 20))
    assert [frame.server_round for frame in frames] == [1, 2, 3]
    from dataclasses import replace

    def packed(*parts: Frame, changes: int = 3) -> Request:
        joined = b"".join(map(pack_frame, parts))
        return Request((1,), joined, run=5, paths=(Path(changes, 0),))

    first, second, third = frames
    assert frames_by_tier(packed(first, second, third)) == [frames]
    wrong = [
        packed(first, third, changes=2),
        packed(third, second, first),
        packed(first, second, replace(third, count=7)),
        packed(replace(first, plan_digest=b"\1" * 16), second, third),
        packed(first, replace(second, client=9), third),
        packed(first, second, third, changes=2),
        packed(first, second, third, changes=4),
        packed(changes=1),
    ]
    for request_ in wrong:
        with pytest.raises(FrameError):
            frames_by_tier(request_)


def test_values_are_refused_where_the_plan_says_changes_and_the_reverse(
    tmp_path: FilePath,
) -> None:
    plan, downlink = three_rounds()
    [frame] = unpack_frames(downlink.to(0, 2).frames, max_frames=1, max_payload_bytes=1 << 20)
    with pytest.raises(FrameError, match="'delta'"):
        receive(plan, Request((1,), pack_frame(frame)), StateStore(tmp_path))
    values = make_plan(codec_of(downlink="eden-4", downlink_mode="full"))
    with pytest.raises(FrameError, match="'full'"):
        receive(values, request(downlink.to(0, 2)), StateStore(tmp_path))


# -- what lies on the disk -------------------------------------------------------------------


def test_a_residual_is_found_by_client_round_and_run_alone(tmp_path: FilePath) -> None:
    folder = state_folder(tmp_path, b"\2" * 16, 5)
    first, again = StateStore(folder), StateStore(folder)
    residual = np.arange(6, dtype=np.float32)
    first.keep_residual(9, 1, residual, accepted=0)
    assert (again.residual(9, 1, 6) == residual).all()
    assert again.residual(9, 2, 6) is None
    assert again.residual(8, 1, 6) is None
    assert again.residual(9, 1, 5) is None
    assert StateStore(state_folder(tmp_path, b"\2" * 16, 6)).residual(9, 1, 6) is None
    assert StateStore(state_folder(tmp_path, b"\3" * 16, 5)).residual(9, 1, 6) is None


def test_the_residual_of_the_last_accepted_round_outlives_every_refused_one(
    tmp_path: FilePath,
) -> None:
    state = StateStore(tmp_path / "a" / "b" / "c")
    accepted = 0
    random = np.random.default_rng(0)
    for server_round in range(1, 60):
        if accepted:
            kept = state.residual(9, accepted, 4)
            assert kept is not None
            assert (kept == accepted).all()
        residual = np.full(4, server_round, dtype=np.float32)
        state.keep_residual(9, server_round, residual, accepted=accepted)
        if random.random() < 0.4:
            accepted = server_round
    assert len(list(state.folder.iterdir())) == 2


def test_what_a_run_left_is_removed_a_week_after_its_last_message(tmp_path: FilePath) -> None:
    import os

    old = StateStore(state_folder(tmp_path, b"\1" * 16, 1)).folder
    os.utime(old, (1e9, 1e9))
    recent = StateStore(state_folder(tmp_path, b"\1" * 16, 2)).folder
    StateStore(state_folder(tmp_path, b"\2" * 16, 3))
    assert not old.exists()
    assert recent.exists()
