"""Compute the seconds of a message on named links, at nominal rates.

A rate is no promise: the standard or its scheduling allows it to one device under the best
conditions, with no one else on the air. Distance, load and repetitions only add.

LoRaWAN in EU868 at DR5 (SF7, 125 kHz, the fastest of the mandatory rates): a frame carries 222
bytes of the application's, 13 of LoRaWAN's, and 20.25 symbols of preamble and header. A device
keeps to 1 % of the time in the band of the default channels. So does the gateway in that band, for
all its devices together, and a device of class A hears one frame after each that it sends.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from fedpet.errors import ConfigError

__all__ = ["LINKS", "Direction", "Link", "find_links"]


@dataclass(frozen=True)
class Direction:
    """Describe one way of a link."""

    bits_per_second: float  # while it sends
    duty_cycle: float = 1.0  # fraction of the time in which it may
    frame_bytes: int = 0  # of a message in a frame; 0 where the rate has its fragments in it
    overhead_bytes: int = 0  # of a frame besides
    overhead_seconds: float = 0.0  # of a frame besides

    def seconds(self, num_bytes: float) -> float:
        """Return a message's seconds, the silence that a duty cycle asks for included."""
        frames = math.ceil(num_bytes / self.frame_bytes) if self.frame_bytes else 0
        sent = num_bytes + frames * self.overhead_bytes
        on_air = 8 * sent / self.bits_per_second + frames * self.overhead_seconds
        return on_air / self.duty_cycle


@dataclass(frozen=True)
class Link:
    """Describe a kind of radio."""

    name: str  # as `--link` takes it
    title: str  # as a table shows it
    up: Direction  # from the device
    down: Direction  # to the device
    what: str  # assumptions, in a few words
    sources: tuple[str, ...]  # of the figures


_DR5 = Direction(
    5470, duty_cycle=0.01, frame_bytes=222, overhead_bytes=13, overhead_seconds=20.25 * 1.024e-3
)

LINKS = (
    Link(
        "lorawan",
        "LoRaWAN",
        up=_DR5,
        down=_DR5,
        what="EU868, DR5, 1 % of the time, 222 bytes a frame",
        sources=(
            "LoRa Alliance, LoRaWAN Regional Parameters, EU863-870: DR5 5470 bit/s, N = 222 bytes",
            "ETSI EN 300 220-2 V3.2.1, band M (868.0 to 868.6 MHz): duty cycle 1 %",
            "Semtech AN1200.13: preamble and header, 20.25 symbols of 1.024 ms at SF7",
        ),
    ),
    Link(
        "nb-iot",
        "NB-IoT",
        up=Direction(1000 / 16e-3),
        down=Direction(680 / 26e-3),
        what="Release 13, Cat-NB1, multi-tone, no repetitions",
        sources=(
            "3GPP TS 36.213 Release 13, 16.4 and 16.5: blocks up to 680 bits down, 1000 up; with "
            "control, gaps and acknowledgement one every 26 ms down, 16 ms up",
        ),
    ),
    Link(
        "lte-m",
        "LTE-M",
        up=Direction(375e3),
        down=Direction(300e3),
        what="Release 13, Cat-M1, half duplex, no repetitions",
        sources=(
            "3GPP TS 36.306 Release 13, category M1: blocks of 1000 bits, 1 Mbit/s while sending; "
            "with half-duplex scheduling (TS 36.213) 300 kbit/s down, 375 up",
        ),
    ),
    Link(
        "4g",
        "4G",
        up=Direction(50e6),
        down=Direction(150e6),
        what="LTE, device category 4, peak",
        sources=("3GPP TS 36.306, tables 4.1-1 and 4.1-2: category 4",),
    ),
    Link(
        "wifi",
        "Wi-Fi",
        up=Direction(65e6),
        down=Direction(65e6),
        what="802.11n, one stream, 20 MHz, MCS 7",
        sources=("IEEE 802.11-2020, 19.5: HT-MCS 7 at 20 MHz, guard interval 800 ns",),
    ),
)


def find_links(names: Iterable[str]) -> tuple[Link, ...]:
    """Return links by name; all of them where none is named.

    Raises:
        ConfigError: There is no link of that name.
    """
    known = {link.name: link for link in LINKS}
    names = [name.strip().lower() for name in names]
    for name in names:
        if name not in known:
            raise ConfigError(f"there is no link {name!r}. Known are: {', '.join(known)}.")
    return tuple(known[name] for name in dict.fromkeys(names)) or LINKS
