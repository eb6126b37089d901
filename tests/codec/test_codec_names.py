"""Test the names of codecs, one name and one number each, and which of them go together."""

from __future__ import annotations

import pytest
from sending import codec_of
from vectors import CODECS

from fedpet.codec import check_codecs
from fedpet.codec.spec import codec_from_number, parse_codec
from fedpet.config import CodecConfig
from fedpet.errors import ConfigError, FrameError


@pytest.mark.parametrize("codec", CODECS)
def test_a_codec_has_one_name_and_one_number(codec):
    parse_codec(codec)
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
        parse_codec(name)


@pytest.mark.parametrize("number", [0, 21, 0x7F, 0xFFFFFFFF, 1_000_000 << 8 | 1])
def test_a_number_no_codec_has_is_refused(number):
    with pytest.raises(FrameError, match="another version"):
        codec_from_number(number)


@pytest.mark.parametrize(
    ("codec", "words"),
    [
        (codec_of(head_uplink="int7"), "unknown codec 'int7'"),
        (codec_of(head_downlink="eden-9"), "unknown codec 'eden-9'"),
        (codec_of(error_feedback=True), "loses nothing"),
    ],
)
def test_codecs_that_do_not_go_together_are_refused(codec: CodecConfig, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_codecs(codec)
    check_codecs(codec_of(head_uplink="int4", error_feedback=True))


def test_an_unknown_downlink_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="delta, full"):
        codec_of(downlink_mode="everything")
