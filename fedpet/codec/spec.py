"""Parse a codec's name, and convert it to the number in a frame and back.

In:  a name from an experiment, such as "dither-4", "int8-raw" or "topk-0.1+dither-4".
Out: a `Codec`, its parts checked; or the 32-bit id that a frame carries, and back.

A name is `[topk-FRACTION+]BASE[-raw]`. `-raw` leaves the entropy stage out: quicker, larger.
`topk-0.1+` sends the tenth largest in magnitude of every group, with their positions, through BASE.
One codec has one spelling, so that a name, its id and the plan's digest cannot disagree.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from fedpet.config import CodecConfig
from fedpet.errors import ConfigError, FrameError

CODEC_IDS = {"float32": 1, "bfloat16": 2, "int8": 3, "int4": 4} | {
    f"{family}-{bits}": first + bits
    for family, first in (("eden", 4), ("dither", 12))
    for bits in range(1, 9)
}
_BASES = {number: base for base, number in CODEC_IDS.items()}
_RAW = 0x80  # of the id's low byte
PPM = 1_000_000  # a top-k fraction is kept in millionths, in the id's upper 24 bits


@dataclass(frozen=True)
class Codec:
    """The parts of a codec's name.

    Attributes:
        base: "float32", "bfloat16", "int8", "int4", "eden-1" to "eden-8", "dither-1" to "dither-8".
        entropy: The entropy stage follows.
        topk_ppm: Share of every group that is sent, in millionths; 0 sends all of it.
    """

    base: str
    entropy: bool = True
    topk_ppm: int = 0

    @property
    def name(self) -> str:
        """The only spelling of this codec."""
        share = ""
        if self.topk_ppm:
            share = f"topk-{(Decimal(self.topk_ppm) / PPM).normalize():f}+"
        return share + self.base + ("" if self.entropy else "-raw")

    @property
    def number(self) -> int:
        """The id of this codec in a frame, uint32."""
        return self.topk_ppm << 8 | CODEC_IDS[self.base] | (0 if self.entropy else _RAW)

    @property
    def is_lossless(self) -> bool:
        """True if every value comes back to the bit."""
        return self.base == "float32" and not self.topk_ppm

    @property
    def is_dithered(self) -> bool:
        """True if values are rotated and dithered, so that senders may share a rotation."""
        return self.base.startswith("dither-")

    @property
    def bits(self) -> int:
        """Bits a value that the name stands for; the entropy stage is not counted."""
        fixed = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4}
        return fixed.get(self.base) or int(self.base.rpartition("-")[2])


def parse_codec(name: str) -> Codec:
    """Parse a codec's name.

    Raises:
        ConfigError: There is no such codec, or it is spelt another way.
    """
    share, plus, rest = name.rpartition("+")
    topk_ppm = 0
    if plus:
        try:
            fraction = Decimal(share.removeprefix("topk-"))
        except InvalidOperation:
            fraction = Decimal(0)
        if not (share.startswith("topk-") and fraction.is_finite() and 0 < fraction < 1):
            raise ConfigError(
                f"a codec may be prefixed by 'topk-FRACTION+' with a fraction in (0, 1), got "
                f"{name!r}. To send the tenth largest of every group, write 'topk-0.1+dither-4'."
            )
        if fraction * PPM % 1:
            raise ConfigError(
                f"a top-k fraction is kept in millionths, got {name!r}: round it to six decimals."
            )
        topk_ppm = int(fraction * PPM)
    base = rest.removesuffix("-raw")
    if base not in CODEC_IDS:
        raise ConfigError(
            f"unknown codec {name!r}. Known are {', '.join(CODEC_IDS)}, each with '-raw' behind "
            "it to leave the entropy stage out, and with 'topk-0.1+' before it to send a tenth."
        )
    codec = Codec(base, not rest.endswith("-raw"), topk_ppm)
    if codec.name != name:
        raise ConfigError(f"a codec has one spelling: write {codec.name!r}, got {name!r}.")
    return codec


def check_codecs(config: CodecConfig) -> None:
    """Refuse codecs that are not known, or do not go together.

    Raises:
        ConfigError: One sentence on the first that is wrong.
    """
    for name in (config.uplink, config.downlink, config.head_uplink, config.head_downlink):
        if name:
            parse_codec(name)
    up = (config.uplink, config.head_uplink or "float32")
    if config.error_feedback and all(parse_codec(name).is_lossless for name in up):
        raise ConfigError(
            f"codec.error-feedback keeps what codec.uplink loses, and {config.uplink!r} loses "
            "nothing: name a lossy codec, such as 'topk-0.1+dither-4', or set it to false."
        )


def codec_from_number(number: int) -> Codec:
    """Return the codec of a frame's id.

    Raises:
        FrameError: No codec has this id.
    """
    base, topk_ppm = _BASES.get(number & 0x7F), number >> 8
    if base is None or topk_ppm >= PPM:
        raise FrameError(
            f"a frame names its codec by an id of version 1, got {number:#010x}. The sender runs "
            "another version of fedpet, or the bytes are damaged."
        )
    return Codec(base, not number & _RAW, topk_ppm)
