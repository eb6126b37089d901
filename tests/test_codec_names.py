"""What codecs are called: one name and one number each."""

from __future__ import annotations

import pytest
from vectors import CODECS

from fedpet.codec import check_codec
from fedpet.codec.names import codec_from_number, parse_codec
from fedpet.errors import ConfigError, FrameError


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
