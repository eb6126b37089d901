"""The table of attacks: cells that are resumed, liars that are as many as it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tomli_w
from tiny import Silent

from benchmarks import attacks
from benchmarks.attacks import ATTACKS, Liars, cells, summary
from benchmarks.cell import complete
from fedpet.codec import decode_values
from fedpet.errors import FrameError
from fedpet.pet.layout import quantisation_groups
from fedpet.protocol.codec_seeds import uplink_seeds
from fedpet.protocol.frame import Frame, unpack_frames
from fedpet.run.federate import prepare


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    return (
        tiny.make_backbone(folder / "backbone"),
        tiny.make_rows(folder / "rows", clients=10, rows_per_client=4),
    )


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_fifth_of_the_clients_send_what_the_attack_says_in_proper_frames(
    files: tuple[Path, Path], tmp_path: Path, attack: str
) -> None:
    import fake_training

    from fedpet.protocol.request import Request, write_request
    from fedpet.utils.seeds import client_id64

    settings = tiny.make_experiment(*files, tmp_path / "run")
    prepared = prepare(settings, Silent())
    count, groups = prepared.plan.num_values, quantisation_groups(prepared.pet.segments)
    numbers = tuple(client_id64(f"client {n}") for n in range(10))
    honest = {number: np.full(count, 1 + n, np.float32) for n, number in enumerate(numbers)}

    def answer(payload: bytes) -> bytes:
        return b"".join(
            fake_training.frame_of(number, honest[number], groups) for number in numbers
        )

    liars = Liars(answer, prepared, ATTACKS[attack])
    whole = liars.answer(write_request(Request(numbers, b"")))
    lies = []
    for frame in unpack_frames(whole, max_frames=10, max_payload_bytes=len(whole)):
        assert isinstance(frame, Frame)
        seeds = uplink_seeds(0, 1, frame.client)
        update = honest[frame.client]
        if attack == "nan":
            try:
                decode_values(frame.payload, frame.codec, groups, **seeds)
            except FrameError:
                lies.append(update)
            continue
        sent = decode_values(frame.payload, frame.codec, groups, **seeds)
        if not np.array_equal(sent, update):
            lies.append(sent)
            assert np.linalg.norm(sent) == pytest.approx(10 * np.linalg.norm(update), rel=1e-5)
            if attack == "sign-flip":
                assert np.array_equal(sent, -10 * update)
    assert len(lies) == (0 if attack == "none" else 2)


def test_cells_are_run_once_and_the_table_holds_all(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = tiny.make_experiment(*files, tmp_path / "unused")
    (tmp_path / "job.toml").write_text(tomli_w.dumps(experiment.to_tables()), encoding="utf-8")
    smaller = ("strategy.num-rounds=1", "strategy.clients-per-round=10", "run.out=''")
    monkeypatch.setattr(attacks, "SMALLER", smaller)
    monkeypatch.setattr(
        attacks,
        "STRATEGY_PARAMETERS",
        {name: attacks.STRATEGY_PARAMETERS[name] for name in ("fedavg", "krum")},
    )
    monkeypatch.setattr(attacks, "ATTACKS", {name: ATTACKS[name] for name in ("sign-flip", "nan")})
    ran: list[str] = []
    arguments: Any = (str(tmp_path / "job.toml"), ["training.learning-rate=0.02"], tmp_path, 0)
    complete(list(cells(*arguments)), ran.append)
    assert len([line for line in ran if "refused" in line]) == 4
    complete(list(cells(*arguments)), ran.append)
    assert ran[-1] == "4 of 4 cells are there already"
    found = summary(list(cells(*arguments)))
    assert found["table"]["krum"]["nan"]["refused"] == 2
    assert found["table"]["fedavg"]["sign-flip"]["status"] == "ok"
    stored = json.loads((tmp_path / "krum-nan-seed0.json").read_text())
    assert stored["result"]["attack"] == {"kind": "nan", "liars": 0.2, "factor": 10.0}
    assert "| krum |" in attacks.as_text(found)
