"""What every codec promises: law 5 (what is decoded is what was encoded), and the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedpet.codec import (
    Coding,
    check_codec,
    decode_values,
    encode_values,
    encode_with_feedback,
    known_codecs,
    max_payload_bytes,
)
from fedpet.codec.floats import pack_words
from fedpet.codec.names import codec_from_number, parse_codec
from fedpet.codec.wire import Reader, pack_symbols, unpack_symbols, varint
from fedpet.errors import ConfigError, FrameError, TrainingError

CODECS = (*known_codecs(), "topk-0.1+eden-4", "topk-0.25+float32-raw", "topk-0.999999+int8")
LOSSLESS = ("float32", "float32-raw")
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True)


def roundtrip(values, codec, groups=None, seed=0):
    groups = groups or [(0, len(values))]
    return decode_values(encode_values(values, codec, groups, seed=seed), codec, groups, seed=seed)


def draw(name, count, seed=0):
    rng = np.random.default_rng(seed)
    values = {
        "gaussian": rng.standard_normal,
        "laplace": lambda n: rng.laplace(size=n),
        "student-t3": lambda n: rng.standard_t(3, size=n),
        "spike": lambda n: np.eye(1, n, n // 3)[0],
    }[name](count)
    return values.astype(np.float32)


def squared_error(values, decoded):
    """Relative to the squared norm."""
    values = values.astype(np.float64)
    return ((decoded - values) ** 2).sum() / (values**2).sum()


# ---------------------------------------------------------------- what is decoded


@pytest.mark.parametrize("codec", LOSSLESS)
@settings(deadline=None)
@given(values=arrays(np.float32, st.integers(0, 300), elements=FINITE))
def test_float32_gives_back_the_same_bits(codec, values):
    decoded = roundtrip(values, codec)
    assert decoded.dtype == np.float32
    assert decoded.tobytes() == values.tobytes()  # minus zero and subnormals too


@settings(max_examples=60, deadline=None)
@given(
    values=arrays(np.float32, st.integers(0, 300), elements=FINITE),
    codec=st.sampled_from([c for c in CODECS if "eden" not in c]),
    seed=st.integers(0, 2**128),
)
@example(values=np.full(3, np.finfo(np.float32).max), codec="int8", seed=0)
@example(values=np.array([3.3961777e38], dtype=np.float32), codec="int4", seed=0)
def test_every_finite_vector_decodes_to_a_finite_one_of_its_length(values, codec, seed):
    decoded = roundtrip(values, codec, seed=seed)
    assert decoded.shape == values.shape
    assert np.isfinite(decoded).all()


@settings(max_examples=60, deadline=None)
@given(
    values=arrays(
        np.float32, st.integers(0, 300), elements=st.floats(-(2.0**99), 2.0**99, width=32)
    ),
    bits=st.integers(1, 8),
    seed=st.integers(0, 2**64),
)
def test_every_vector_up_to_1e30_can_be_rotated(values, bits, seed):
    decoded = roundtrip(values, f"eden-{bits}", seed=seed)
    assert np.isfinite(decoded).all()
    norm = np.linalg.norm(values.astype(np.float64))
    # At worst (a window of few values) the error is of the vector's own size, never more of it.
    assert np.linalg.norm(decoded - values.astype(np.float64)) <= 2 * norm + 1e-37


@settings(max_examples=60, deadline=None)
@given(values=arrays(np.float32, st.integers(1, 3000), elements=st.floats(-1e4, 1e4, width=32)))
def test_an_integer_codec_errs_by_less_than_its_blocks_scale(values):
    for codec, limit, block in (("int8", 127, 1024), ("int4", 7, 64)):
        error = np.abs(roundtrip(values, codec) - values)
        for start in range(0, len(values), block):
            part = slice(start, start + block)
            # bfloat16 rounds the scale up by 2^-7 at most.
            scale = np.abs(values[part]).max() / limit * (1 + 2**-7)
            assert error[part].max() <= scale * (1 + 1e-6) + 1e-40


@settings(deadline=None)
@given(values=arrays(np.float32, st.integers(1, 300), elements=FINITE))
def test_bfloat16_errs_by_less_than_its_last_place(values):
    decoded = roundtrip(values, "bfloat16").astype(np.float64)
    assert (np.abs(decoded - values) <= np.abs(values.astype(np.float64)) * 2**-7 + 1e-40).all()


def test_bfloat16_keeps_what_bfloat16_has():
    values = (draw("gaussian", 5000).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    assert roundtrip(values, "bfloat16").tobytes() == values.tobytes()


@pytest.mark.parametrize("codec", CODECS)
def test_groups_of_any_sizes_keep_their_order(codec):
    sizes = [1, 0, 2, 31, 32, 33, 384, 5000, 0, 4096]
    stops = np.cumsum(sizes).tolist()
    groups = list(zip([0, *stops[:-1]], stops, strict=True))
    values = draw("gaussian", stops[-1])
    decoded = roundtrip(values, codec, groups)
    for start, stop in groups:
        if stop - start > 300:
            assert np.corrcoef(decoded[start:stop], values[start:stop])[0, 1] > 0.5


@pytest.mark.parametrize("codec", CODECS)
def test_no_values_take_no_bytes(codec):
    assert encode_values(np.empty(0, np.float32), codec, [], seed=0) == b""
    assert len(decode_values(b"", codec, [(0, 0)], seed=0)) == 0


@pytest.mark.parametrize("codec", [c for c in CODECS if not c.endswith("-raw")])
def test_zeros_cost_next_to_nothing(codec):
    zeros = np.zeros(54_321, dtype=np.float32)
    assert len(encode_values(zeros, codec, [(0, 54_321)], seed=0)) < 130
    assert not roundtrip(zeros, codec).any()


# ---------------------------------------------------------------- its error


@pytest.mark.parametrize("distribution", ["gaussian", "laplace", "student-t3"])
@pytest.mark.parametrize(
    ("bits", "expected"),
    # Lloyd-Max distortion D of a unit normal variable under the unbiased scale: D / (1 - D).
    [(1, 0.573), (2, 0.133), (3, 0.0358), (4, 0.0096)],
)
def test_eden_errs_as_much_as_the_theory_says_on_any_distribution(bits, expected, distribution):
    values = draw(distribution, 400_000)
    assert squared_error(values, roundtrip(values, f"eden-{bits}")) == pytest.approx(
        expected, rel=0.03
    )


@pytest.mark.parametrize("distribution", ["gaussian", "laplace", "student-t3", "spike"])
def test_eden_at_6_and_8_bits_errs_by_less_than_7e_4_and_5e_5(distribution):
    values = draw(distribution, 100_000)
    assert squared_error(values, roundtrip(values, "eden-6")) <= 7e-4
    assert squared_error(values, roundtrip(values, "eden-8")) <= 5e-5


@pytest.mark.parametrize(
    ("codec", "distribution", "expected", "most_bits"),
    [
        # Unbiased stochastic rounding with a scale for each block: the coder itself is within 2 %.
        ("int8", "gaussian", 1.23e-4, 7.30),
        ("int8", "laplace", 3.05e-4, 6.60),
        ("int4", "gaussian", 2.33e-2, 3.66),
        ("int4", "laplace", 4.05e-2, 3.26),
    ],
)
def test_integers_err_as_their_blocks_say(codec, distribution, expected, most_bits):
    values = draw(distribution, 400_000)
    payload = encode_values(values, codec, [(0, len(values))], seed=1)
    decoded = decode_values(payload, codec, [(0, len(values))], seed=1)
    assert squared_error(values, decoded) == pytest.approx(expected, rel=0.05)
    assert 8 * len(payload) / len(values) < most_bits


def bias(values, codec, num_seeds):
    """How large the mean error is against what chance alone makes of it: near 1 without bias."""
    total = np.zeros(len(values))
    squares = 0.0
    for seed in range(num_seeds):
        error = roundtrip(values, codec, seed=seed).astype(np.float64) - values
        total += error
        squares += error @ error
    return (total @ total) / squares, (total @ values) / num_seeds / (values @ values)


@pytest.mark.parametrize("codec", ["bfloat16-raw", "int8-raw", "int4-raw"])
@pytest.mark.parametrize("distribution", ["gaussian", "student-t3"])
def test_over_seeds_rounding_has_no_bias(codec, distribution):
    ratio, along = bias(draw(distribution, 3000), codec, 200)
    assert 0.8 < ratio < 1.2  # a bias of a tenth of one error would make it 4
    assert abs(along) < 1e-3


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("distribution", ["gaussian", "student-t3", "spike"])
def test_over_seeds_eden_has_no_bias(bits, distribution):
    ratio, along = bias(draw(distribution, 3000), f"eden-{bits}-raw", 150)
    assert 0.85 < ratio < 1.15
    assert abs(along) < 1e-6  # the scale sees to that, seed by seed


def test_the_mean_of_many_clients_errs_by_their_number_less():
    values = draw("gaussian", 5000)
    mean = np.mean([roundtrip(values, "eden-2", seed=client) for client in range(50)], axis=0)
    assert squared_error(values, mean) == pytest.approx(0.133 / 50, rel=0.1)


@pytest.mark.parametrize("codec", [c for c in known_codecs() if c not in LOSSLESS])
def test_a_loud_group_does_not_ruin_the_others(codec):
    quiet, loud = draw("gaussian", 5000), 1e6 * draw("gaussian", 700, seed=1)
    groups = [(0, 5000), (5000, 5700)]
    together = roundtrip(np.concatenate((quiet, loud)), codec, groups, seed=3)
    alone = roundtrip(quiet, codec, seed=3)
    assert squared_error(quiet, together[:5000]) == pytest.approx(
        squared_error(quiet, alone), rel=0.1
    )


# ---------------------------------------------------------------- its bytes


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
@settings(max_examples=8, deadline=None)
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
    "codec", ["float32", "bfloat16", "int8", "int4", "eden-2", "eden-3", "eden-4", "eden-8"]
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
@pytest.mark.parametrize("deviation", [0.3, 1.0, 2.3, 10.0, 40.0])
def test_coded_symbols_are_within_2_percent_of_their_empirical_entropy(count, deviation):
    # 0.3: nearly all zeros, 0.5 bits a symbol; 40: an int8 block's, 7.3 bits of 8.
    normal = np.random.default_rng(0).standard_normal(count) * deviation
    limit = 127 if deviation > 3 else 7
    symbols = (np.clip(np.rint(normal), -limit, limit) + limit).astype(np.uint8)
    coded = pack_symbols(symbols, 2 * limit + 1)
    assert len(coded) < 1.02 * entropy_bytes(symbols)
    assert (unpack_symbols(Reader(coded), count, 2 * limit + 1) == symbols).all()


@pytest.mark.parametrize("distribution", ["gaussian", "laplace", "student-t3"])
@pytest.mark.parametrize("codec", ["float32", "bfloat16"])
def test_coded_floats_are_within_2_percent_of_what_their_exponents_allow(codec, distribution):
    values = draw(distribution, 54_321)
    exponents = (values.view(np.uint32) >> np.uint32(23) & np.uint32(0xFF)).astype(np.uint8)
    noise_bits = 24 if codec == "float32" else 8  # mantissa and sign
    limit = entropy_bytes(exponents) + len(values) * noise_bits / 8
    assert len(encode_values(values, codec, [(0, len(values))], seed=0)) < 1.02 * limit


@settings(deadline=None)
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
        "for codec in ('int8', 'int4', 'eden-1', 'eden-4', 'topk-0.1+eden-3'):\n"
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
    cases = json.loads((Path(__file__).parent / "cases" / "codec_payloads.json").read_text())
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


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_never_encoded(codec, wrong):
    values = draw("gaussian", 100)
    values[17] = wrong
    with pytest.raises(TrainingError, match=r"must be finite, got -?(nan|inf) at position 17"):
        encode_values(values, codec, [(0, 100)], seed=0)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize("base", ["float32-raw", "bfloat16-raw"])
def test_a_payload_of_values_that_are_not_finite_is_refused(base, wrong):
    values = draw("gaussian", 100)
    values[17] = wrong
    words = values.view(np.uint32)
    if base == "bfloat16-raw":
        words = (words >> np.uint32(16)).astype(np.uint16)
    payload = pack_words(words, entropy=False)
    with pytest.raises(FrameError, match=r"must be finite, got (nan|inf) at position 17"):
        decode_values(payload, base, [(0, 100)], seed=0)


@pytest.mark.parametrize("scale", [np.nan, np.inf, -1.0, -0.0, 3e38])
def test_a_scale_that_is_not_finite_or_overflows_is_refused(scale):
    groups = [(0, 4096)]
    payload = encode_values(draw("gaussian", 4096), "eden-8-raw", groups, seed=0)
    forged_scale = pack_words(np.float32([scale]).view(np.uint32), entropy=False)
    forged = forged_scale + payload[len(forged_scale) :]
    with pytest.raises(FrameError, match="finite"):
        decode_values(forged, "eden-8-raw", groups, seed=0)


def test_a_symbol_beyond_the_codecs_range_is_refused():
    groups = [(0, 64)]
    payload = encode_values(draw("gaussian", 64), "int8-raw", groups, seed=0)
    with pytest.raises(FrameError, match="below 255"):
        decode_values(payload[:-1] + b"\xff", "int8-raw", groups, seed=0)
    payload = encode_values(draw("gaussian", 64), "int4-raw", groups, seed=0)
    with pytest.raises(FrameError, match="below 15"):
        decode_values(payload[:-32] + b"\xff" * 32, "int4-raw", groups, seed=0)


def test_more_values_than_top_k_may_send_are_refused():
    values, groups = draw("gaussian", 1000), [(0, 1000)]
    payload = encode_values(values, "topk-0.2+int8", groups, seed=0)
    with pytest.raises(FrameError, match="at most 100 of a group of 1000 values, got 200"):
        decode_values(payload, "topk-0.1+int8", groups, seed=0)


def test_a_plane_that_unpacks_to_more_than_the_plan_says_is_refused_and_never_unpacked():
    bomb = zstandard.ZstdCompressionParameters.from_level(
        19, write_content_size=True, format=zstandard.FORMAT_ZSTD1_MAGICLESS
    )
    packed = zstandard.ZstdCompressor(compression_params=bomb).compress(bytes(50_000_000))
    payload = b"\0" + (b"\x01" + varint(len(packed)) + packed) * 4
    with pytest.raises(FrameError, match="size of its own"):
        decode_values(payload, "float32", [(0, 1000)], seed=0)


def test_a_plane_that_asks_for_a_large_window_is_refused():
    groups = [(0, 3000)]
    payload = encode_values(np.zeros(3000, np.float32), "float32", groups, seed=0)
    assert payload[1] == 1  # the first plane is compressed: mode, length, descriptor, window
    for window in range(8 * 8, 256):
        forged = payload[:4] + bytes([window]) + payload[5:]
        with pytest.raises(FrameError, match="is damaged"):
            decode_values(forged, "float32", groups, seed=0)


@pytest.mark.parametrize("codec", CODECS)
def test_every_cut_and_every_longer_payload_is_refused(codec):
    values, groups = draw("gaussian", 500), [(0, 480), (480, 500)]
    payload = encode_values(values, codec, groups, seed=0)
    for end in range(0, len(payload), max(len(payload) // 60, 1)):
        with pytest.raises(FrameError):
            decode_values(payload[:end], codec, groups, seed=0)
    with pytest.raises(FrameError):
        decode_values(payload + b"\0", codec, groups, seed=0)


@settings(max_examples=120, deadline=None)
@given(data=st.data(), codec=st.sampled_from(CODECS))
def test_a_forged_payload_decodes_to_finite_values_or_is_refused(data, codec):
    groups = [(0, 100), (100, 110)]
    payload = bytearray(encode_values(draw("gaussian", 110), codec, groups, seed=0))
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, len(payload) - 1))
        payload[where] = data.draw(st.integers(0, 255))
    try:
        decoded = decode_values(payload, codec, groups, seed=0)
    except FrameError:
        return
    assert decoded.shape == (110,)
    assert np.isfinite(decoded).all()


@settings(max_examples=100, deadline=None)
@given(payload=st.binary(max_size=200), codec=st.sampled_from(CODECS))
def test_random_bytes_decode_to_finite_values_or_are_refused(payload, codec):
    try:
        decoded = decode_values(payload, codec, [(0, 40)], seed=0)
    except FrameError:
        return
    assert np.isfinite(decoded).all()


def test_groups_that_leave_a_gap_are_refused():
    with pytest.raises(ValueError, match=r"follow one another from 0, got \(60, 100\) behind 50"):
        encode_values(draw("gaussian", 100), "int8", [(0, 50), (60, 100)], seed=0)
    with pytest.raises(ValueError, match="groups end at 50"):
        encode_values(draw("gaussian", 100), "int8", [(0, 50)], seed=0)


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("codec", CODECS)
def test_a_codec_has_one_name_and_one_number(codec):
    check_codec(codec)
    assert codec_from_number(parse_codec(codec).number).name == codec


def test_no_two_codecs_share_a_number():
    assert len({parse_codec(codec).number for codec in CODECS}) == len(CODECS)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("int2", "unknown codec 'int2'. Known are float32,"),
        ("eden-9", "unknown codec"),
        ("", "unknown codec"),
        ("topk-0.1", "unknown codec"),
        ("topk-10+eden-4", r"fraction in \(0, 1\)"),
        ("topk-x+eden-4", r"fraction in \(0, 1\)"),
        ("topk-nan+eden-4", r"fraction in \(0, 1\)"),
        ("top-0.1+eden-4", r"fraction in \(0, 1\)"),
        ("topk-0.10+eden-4", "write 'topk-0.1\\+eden-4'"),
        ("topk-0.0000001+eden-4", "round it to six decimals"),
        ("topk-0.1+topk-0.1+eden-4", r"fraction in \(0, 1\)"),
    ],
)
def test_a_name_no_codec_has_is_refused_with_the_right_ones(name, says):
    with pytest.raises(ConfigError, match=says):
        check_codec(name)


@pytest.mark.parametrize("number", [0, 13, 0x7F, 0xFFFFFFFF, 1_000_000 << 8 | 1])
def test_a_number_no_codec_has_is_refused(number):
    with pytest.raises(FrameError, match="another version"):
        codec_from_number(number)


# ---------------------------------------------------------------- top-k and error feedback


def test_top_k_sends_the_largest_of_every_group_and_no_others():
    values = draw("student-t3", 3000)
    groups = [(0, 2000), (2000, 3000)]
    decoded = roundtrip(values, "topk-0.1+float32", groups)
    for start, stop in groups:
        kept = np.flatnonzero(decoded[start:stop])
        assert len(kept) == (stop - start) // 10
        order = np.argsort(-np.abs(values[start:stop]))
        assert set(kept) == set(order[: len(kept)])
        assert (decoded[start:stop][kept] == values[start:stop][kept]).all()


def test_top_k_never_spends_a_position_on_a_zero_and_takes_the_earlier_of_equals():
    values = np.zeros(1000, dtype=np.float32)
    values[[3, 500, 999]] = 1.0
    assert np.flatnonzero(roundtrip(values, "topk-0.1+float32")).tolist() == [3, 500, 999]
    assert np.flatnonzero(roundtrip(values, "topk-0.002+float32")).tolist() == [3, 500]


@pytest.mark.parametrize("codec", ["topk-0.1+eden-4", "eden-1", "int4", "bfloat16"])
def test_with_error_feedback_all_that_is_lost_is_the_last_residual(codec):
    groups = [(0, 4000), (4000, 4100)]
    coding = Coding.of(groups, codec=codec)
    wanted, sent, residual = np.zeros(4100), np.zeros(4100), None
    norms = []
    for round_ in range(60):
        values = draw("laplace", 4100, seed=round_)
        payload, residual = encode_with_feedback(values, residual, coding, seed=round_)
        wanted += values
        sent += decode_values(payload, codec, groups, seed=round_)
        norms.append(np.linalg.norm(residual))
    assert np.abs(wanted - sent - residual).max() < 1e-3
    assert norms[-1] < 1.5 * max(norms[:40])  # it does not grow without end


def test_error_feedback_leaves_its_inputs_as_they_are():
    values, residual = draw("gaussian", 500), draw("gaussian", 500, seed=1)
    before = values.copy(), residual.copy()
    encode_with_feedback(values, residual, Coding("topk-0.1+eden-4", ((0, 500),)), seed=0)
    assert (values == before[0]).all()
    assert (residual == before[1]).all()


def test_a_residual_of_another_plan_is_refused():
    with pytest.raises(ValueError, match="another plan"):
        encode_with_feedback(
            draw("gaussian", 500), np.zeros(400, np.float32), Coding("int4", ((0, 500),)), seed=0
        )
