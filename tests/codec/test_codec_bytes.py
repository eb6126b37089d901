"""A codec's bytes: the same for the same seed, no more than announced, near the entropy."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from vectors import CODECS, draw, roundtrip

from fedpet.codec import decode_values, encode_values, max_payload_bytes
from fedpet.codec.entropy import Reader, pack_symbols, unpack_symbols


@pytest.mark.parametrize("codec", CODECS)
def test_the_same_seed_gives_the_same_bytes(codec):
    values = draw("student-t3", 9000)
    groups = [(0, 8000), (8000, 9000)]
    first = encode_values(values, codec, groups, seed=7)
    assert encode_values(values.copy(), codec, groups, seed=7) == first


@pytest.mark.parametrize("codec", [c for c in CODECS if "float32" not in c])
def test_another_seed_gives_other_errors(codec):
    values = draw("gaussian", 9000)
    assert (roundtrip(values, codec, seed=7) != roundtrip(values, codec, seed=8)).any()


@pytest.mark.parametrize("codec", CODECS)
@given(sizes=st.lists(st.integers(0, 5000), min_size=1, max_size=6), wild=st.booleans())
@settings(max_examples=8)
def test_no_payload_is_longer_than_announced(codec, sizes, wild):
    stops = np.cumsum(sizes).tolist()
    groups = list(zip([0, *stops[:-1]], stops, strict=True))
    values = draw("gaussian", stops[-1])
    if wild:  # every bit random but the exponent's highest: nothing to compress
        bits = np.random.default_rng(0).integers(0, 2**32, stops[-1], dtype=np.uint32)
        values = (bits & np.uint32(0xBFFFFFFF)).view(np.float32)
    payload = encode_values(values, codec, groups, seed=0)
    most = max_payload_bytes(codec, groups)
    assert len(payload) <= most
    if codec.endswith("-raw") and not codec.startswith("topk"):
        assert len(payload) == most


@pytest.mark.parametrize(
    "codec",
    ["float32", "bfloat16", "int8", "int4", "eden-2", "eden-3", "eden-4", "dither-1", "dither-8"],
)
def test_the_entropy_stage_pays(codec):
    values = draw("gaussian", 54_321)
    groups = [(0, 54_321)]
    coded = encode_values(values, codec, groups, seed=0)
    assert len(coded) < 0.97 * len(encode_values(values, f"{codec}-raw", groups, seed=0))
    assert (
        roundtrip(values, codec, groups).tobytes()
        == roundtrip(values, f"{codec}-raw", groups).tobytes()
    )


def entropy_bytes(symbols):
    counts = np.bincount(symbols)
    counts = counts[counts > 0]
    return -(counts @ np.log2(counts / len(symbols))) / 8


@pytest.mark.parametrize("count", [54_321, 400_000])
@pytest.mark.parametrize(
    ("deviation", "limit", "excess"),
    # 40: an int8 block's, 7.3 bits of 8; 0.5: 1.2 bits a symbol. Where nearly all are zero, a
    # Huffman code of pairs spends its least bit on them.
    [(40.0, 127, 1.02), (10.0, 127, 1.02), (2.3, 7, 1.02), (1.0, 7, 1.02), (0.5, 7, 1.08)],
)
def test_coded_symbols_are_near_their_empirical_entropy(count, deviation, limit, excess):
    normal = np.random.default_rng(0).standard_normal(count) * deviation
    symbols = (np.clip(np.rint(normal), -limit, limit) + limit).astype(np.uint8)
    coded = pack_symbols(symbols, 2 * limit + 1)
    assert len(coded) < excess * entropy_bytes(symbols)
    assert (unpack_symbols(Reader(coded), count, 2 * limit + 1) == symbols).all()


@pytest.mark.parametrize("distribution", ["gaussian", "laplace", "student-t3"])
@pytest.mark.parametrize("codec", ["float32", "bfloat16"])
def test_coded_floats_are_within_2_percent_of_what_their_exponents_allow(codec, distribution):
    values = draw(distribution, 54_321)
    exponents = (values.view(np.uint32) >> np.uint32(23) & np.uint32(0xFF)).astype(np.uint8)
    noise_bits = 24 if codec == "float32" else 8  # mantissa and sign
    limit = entropy_bytes(exponents) + len(values) * noise_bits / 8
    assert len(encode_values(values, codec, [(0, len(values))], seed=0)) < 1.02 * limit


@given(
    symbols=st.integers(2, 256).flatmap(
        lambda alphabet: st.tuples(
            st.just(alphabet),
            arrays(np.uint8, st.integers(0, 600), elements=st.integers(0, alphabet - 1)),
        )
    )
)
def test_symbols_of_any_alphabet_come_back(symbols):
    alphabet, wanted = symbols
    for entropy in (True, False):
        coded = pack_symbols(wanted, alphabet, entropy=entropy)
        reader = Reader(coded)
        assert (unpack_symbols(reader, len(wanted), alphabet) == wanted).all()
        reader.end()


def test_the_number_of_threads_changes_no_byte():
    script = (
        "import hashlib, numpy as np\n"
        "from fedpet.codec import *\n"
        "values = np.random.default_rng(0).standard_normal(300_000).astype(np.float32)\n"
        "digest = hashlib.sha256()\n"
        "for codec in ('int8', 'int4', 'eden-1', 'eden-4', 'dither-3', 'topk-0.1+dither-3'):\n"
        "    payload = encode_values(values, codec, [(0, 300_000)], seed=5)\n"
        "    digest.update(payload)\n"
        "    digest.update(decode_values(payload, codec, [(0, 300_000)], seed=5))\n"
        "print(digest.hexdigest())\n"
    )
    digests = set()
    for threads in ("1", "7"):
        environment = os.environ | {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        run = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, check=True
        )
        digests.add(run.stdout)
    assert len(digests) == 1


def test_a_stored_payload_decodes_to_the_same_bits_on_every_machine():
    # Written once by this package (tests/cases/codec_payloads.json says how): what was sent to a
    # device of another kind, or is read by a later version, must be the same values.
    cases = json.loads((Path(__file__).parents[1] / "cases" / "codec_payloads.json").read_text())
    assert {case["codec"] for case in cases["payloads"]} >= {"float32", "int4", "eden-1"}
    for case in cases["payloads"]:
        groups = [tuple(group) for group in case["groups"]]
        payload = bytes.fromhex(case["payload"])
        decoded = decode_values(payload, case["codec"], groups, seed=case["seed"])
        digest = hashlib.sha256(decoded.astype("<f4").tobytes()).hexdigest()
        assert digest == case["sha256"], case["codec"]


def test_a_device_that_decodes_loads_numpy_and_no_more():
    script = "import sys, fedpet.codec; print(*(set(sys.modules) & {'torch', 'scipy', 'flwr'}))"
    run = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        check=True,
        text=True,
    )
    assert run.stdout.strip() == ""
