"""Test the compiled kernels: the bits of numpy, loaded when they pay, and never in the way."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import draw

from fedpet.codec import VectorCodec, acceleration
from fedpet.codec.acceleration import use_kernels

pytest.importorskip("numba")

ROTATED = [f"{family}-{bits}" for family in ("dither", "eden") for bits in range(1, 9)]


@pytest.fixture(scope="module", autouse=True)
def _compiled(tmp_path_factory):
    use_kernels("compiled")
    yield
    use_kernels("auto")


def coded(codec, vectors, groups, rotation_seed):
    """Payloads, decoded vectors and the weighted sum, as bytes."""
    coding = VectorCodec.of(groups, codec=codec)
    added = coding.accumulator(rotation_seed)
    parts = []
    for seed, vector in enumerate(vectors):
        payload = coding.encode(vector, seed=seed, rotation_seed=rotation_seed)
        decoded = coding.decode(payload, seed=seed, rotation_seed=rotation_seed)
        parts += [payload, decoded.tobytes()]
        added.add(payload, seed=seed, weight=seed + 0.7)
    return [*parts, added.total().tobytes()]


@settings(max_examples=40, deadline=None)
@given(
    codec=st.sampled_from([*ROTATED, "dither-3-raw", "topk-0.3+dither-4"]),
    sizes=st.lists(
        st.one_of(st.integers(0, 140), st.sampled_from([770, 4095, 4096, 4097, 10_764])),
        min_size=1, max_size=4,
    ),
    distribution=st.sampled_from(["gaussian", "laplace", "student-t3"]),
    magnitude=st.sampled_from([1.0, 1e-3, 1e25, 1e-29, 1e-38, 0.0]),
    seed=st.integers(0, 2**64),
)  # fmt: skip
def test_compiled_kernels_give_the_bits_of_numpy(codec, sizes, distribution, magnitude, seed):
    stops = np.cumsum([0, *sizes]).tolist()
    groups = list(itertools.pairwise(stops))
    vectors = [
        draw(distribution, stops[-1], seed=index) * np.float32(magnitude) for index in range(2)
    ]
    use_kernels("numpy")
    by_numpy = coded(codec, vectors, groups, seed)
    use_kernels("compiled")
    assert coded(codec, vectors, groups, seed) == by_numpy


def run(script, **environment):
    """A script's output in a process of its own."""
    path = os.pathsep.join(part for part in sys.path if part)
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


SENDS = """
import sys, numpy as np
from fedpet.codec import acceleration, encode_values
values = np.arange(50_000, dtype=np.float32)
for seed in range({rounds}):
    encode_values(values, "dither-3", [(0, 50_000)], seed=seed)
print("numba" in sys.modules)
"""


def test_a_process_that_sends_little_never_loads_numba():
    assert run(SENDS.format(rounds=3)) == "False"


def test_a_process_that_sends_much_loads_it_and_keeps_machine_code_in_the_cache(tmp_path):
    script = "from fedpet.codec import acceleration as a; a.PAYS_AFTER = 60_000\n" + SENDS
    assert run(script.format(rounds=3), FEDPET_CACHE=str(tmp_path)) == "True"
    assert list(tmp_path.glob("kernels/*/compiled.rotate-*.nbc"))


@pytest.mark.parametrize("place", ["/proc/nowhere", "~nobody-of-this-name/x"])
def test_where_nothing_can_be_written_kernels_work_all_the_same(place):
    script = (
        "from fedpet.codec.acceleration import _cache_folder\nwith _cache_folder() as f: print(f)"
    )
    assert run(script, FEDPET_CACHE=place, NUMBA_CACHE_DIR="") == ""


def test_without_numba_numpy_goes_on(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.setattr(acceleration, "_module", None)
    monkeypatch.setattr(acceleration, "_failed", False)
    monkeypatch.setattr(acceleration, "_coded", 0)
    monkeypatch.setattr(acceleration, "_choice", "auto")
    assert acceleration.compiled_kernels(acceleration.PAYS_AFTER) is None
    assert acceleration.compiled_kernels(1) is None
    with pytest.raises(ImportError):
        use_kernels("compiled")
