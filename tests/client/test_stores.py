"""A node's stores on disk: plans by digest, state by run; damage is the same as absence."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from fedpet.client.plan_store import KEEP_SECONDS, PlanStore
from fedpet.client.state_store import StateStore
from fedpet.errors import FrameError, PlanError
from fedpet.protocol.frame import RefusalCode, StateMissingError
from fedpet.protocol.plan import Plan

PLAN = b"the bytes of a plan"
DIGEST = Plan.digest(PLAN)


def test_a_plan_is_given_back_under_its_digest_alone(tmp_path: Path) -> None:
    plans = PlanStore(tmp_path)
    plans.put(PLAN, DIGEST)
    assert PlanStore(tmp_path).get(DIGEST) == PLAN
    with pytest.raises(PlanError, match="do not have the digest"):
        plans.put(PLAN + b"!", DIGEST)
    with pytest.raises(StateMissingError, match="does not hold the plan") as missing:
        plans.get(bytes(16))
    assert missing.value.code == RefusalCode.PLAN_MISSING


@pytest.mark.parametrize("damaged", [b"", PLAN[:-1], PLAN + b"\0", b"another plan"])
def test_a_damaged_plan_is_a_missing_one_and_is_replaced(tmp_path: Path, damaged: bytes) -> None:
    plans = PlanStore(tmp_path)
    plans.put(PLAN, DIGEST)
    plans.path(DIGEST).write_bytes(damaged)
    with pytest.raises(StateMissingError):
        plans.get(DIGEST)
    plans.put(PLAN, DIGEST)
    assert plans.get(DIGEST) == PLAN


def test_a_plan_that_is_not_used_for_long_is_removed_and_one_in_use_is_not(tmp_path: Path) -> None:
    plans = PlanStore(tmp_path)
    others = [b"first", b"second"]
    for other in others:
        plans.put(other, Plan.digest(other))
        old = plans.path(Plan.digest(other)).stat().st_mtime - KEEP_SECONDS - 60
        os.utime(plans.path(Plan.digest(other)), (old, old))
    plans.get(Plan.digest(others[1]))
    plans.put(PLAN, DIGEST)
    with pytest.raises(StateMissingError):
        plans.get(Plan.digest(others[0]))
    assert plans.get(Plan.digest(others[1])) == others[1]


RESIDUAL = np.linspace(-1, 1, 50, dtype=np.float32)


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> StateStore:
    return StateStore(tmp_path_factory.mktemp("cache") / "state" / "plan" / "run")


def test_a_residual_is_a_safetensors_file_that_names_its_round(state: StateStore) -> None:
    state.keep_residual(1, 7, RESIDUAL, accepted=0)
    with safe_open(state.folder / f"{1:016x}.0", framework="numpy") as file:
        assert file.metadata()["round"] == "7"
        assert (file.get_tensor("values") == RESIDUAL).all()


@given(data=st.data())
def test_no_damage_to_a_residual_is_read_as_values(state: StateStore, data: st.DataObject) -> None:
    state.keep_residual(2, 3, RESIDUAL, accepted=0)
    file = state.folder / f"{2:016x}.0"
    whole = file.read_bytes()
    kind = data.draw(st.sampled_from(["flip", "cut", "extend", "header", "noise"]))
    damaged = bytearray(whole)
    if kind == "flip":
        damaged[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        del damaged[data.draw(st.integers(0, len(whole) - 1)) :]
    elif kind == "extend":
        damaged += data.draw(st.binary(min_size=1, max_size=2000))
    elif kind == "header":  # a length of any size
        damaged[:8] = data.draw(st.binary(min_size=8, max_size=8))
    else:
        damaged = bytearray(data.draw(st.binary(max_size=300)))
    file.write_bytes(damaged)
    residual = state.residual(2, 3, len(RESIDUAL))
    assert residual is None or residual.tobytes() == RESIDUAL.tobytes()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_stored_value_that_is_not_finite_is_not_read(state: StateStore, value: float) -> None:
    wrong = RESIDUAL.copy()
    wrong[3] = value
    state.keep_residual(4, 3, wrong, accepted=0)
    assert state.residual(4, 3, len(wrong)) is None


def test_the_accepted_residual_is_given_or_refused_with_its_code(state: StateStore) -> None:
    state.keep_residual(5, 3, RESIDUAL, accepted=0)
    assert (state.accepted_residual(5, 4, 3, len(RESIDUAL)) == RESIDUAL).all()
    with pytest.raises(StateMissingError) as missing:
        state.accepted_residual(5, 4, 2, len(RESIDUAL))
    assert missing.value.code == RefusalCode.RESIDUAL_MISSING
    with pytest.raises(FrameError, match="must be before this one"):
        state.accepted_residual(5, 3, 3, len(RESIDUAL))
