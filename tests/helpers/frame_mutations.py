"""Forged and damaged frames, as an adversary makes them: the checksums right where that helps."""

from __future__ import annotations

import math
import struct
import zlib

from fedpet.codec.entropy import varint

# Where the header's fields stand; see fedpet/protocol/frame.py.
FIELDS = {
    "version": (2, "<B"),
    "kind": (3, "<B"),
    "digest": (4, "<16s"),
    "round": (20, "<I"),
    "client": (24, "<Q"),
    "codec": (32, "<I"),
    "count": (36, "<I"),
    "examples": (40, "<I"),
    "loss": (44, "<d"),
    "seconds": (52, "<d"),
    "length": (60, "<I"),
}


def forge(packed, **fields):
    """Change fields of a frame, and make its checksum right again: an adversary can do that too."""
    forged = bytearray(packed)
    for name, value in fields.items():
        offset, form = FIELDS[name]
        struct.pack_into(form, forged, offset, value)
    struct.pack_into("<I", forged, 64, zlib.crc32(forged[68:], zlib.crc32(forged[:64])))
    return bytes(forged)


def attack(frames, rng):
    """Damage or forge a reply: flips, cuts, extensions, reorderings, forged fields and payloads."""
    forged = list(frames)
    for _ in range(rng.randint(1, 3)):
        which = rng.randrange(len(forged))
        frame = bytearray(forged[which])
        kind = rng.randrange(11) if frame else 10
        if kind == 0:  # flipped bits
            for _ in range(rng.randint(1, 8)):
                frame[rng.randrange(len(frame))] ^= 1 << rng.randrange(8)
        elif kind == 1:  # cut
            del frame[rng.randrange(len(frame)) :]
        elif kind == 2:  # extended
            frame += rng.randbytes(rng.randint(1, 100))
        elif kind == 3:  # parts of it reordered
            a, b = sorted((rng.randrange(len(frame)), rng.randrange(len(frame))))
            frame = frame[b:] + frame[a:b] + frame[:a]
        elif kind == 4 and len(frame) >= 68:  # a forged field under a right checksum
            name = rng.choice(list(FIELDS))
            form = FIELDS[name][1]
            wild = [0, 1, 2**31, 2**32 - 1, 2**60, 2**64 - 1, rng.getrandbits(64)]
            if form == "<d":
                value = rng.choice([math.nan, math.inf, -math.inf, -1.0, 1e308])
            elif form == "<16s":
                value = rng.randbytes(16)
            else:
                value = rng.choice(wild) % (1 << 8 * struct.calcsize(form))
            frame = bytearray(forge(frame, **{name: value}))
        elif kind == 5 and len(frame) > 68:  # a forged payload under a right checksum
            for _ in range(rng.randint(1, 6)):
                frame[rng.randrange(68, len(frame))] = rng.choice([0, 1, 2, 0x7F, 0x80, 0xFF])
            frame = bytearray(forge(frame))
        elif kind == 6 and len(frame) >= 68:  # a payload of another length, announced rightly
            payload = rng.randbytes(rng.randint(0, 300))
            frame = bytearray(forge(bytes(frame[:68]) + payload, length=len(payload)))
        elif kind == 7 and len(frame) > 68:  # NaN and infinity all over
            at = rng.randrange(68, len(frame))
            frame[at : at + 64] = rng.choice([b"\xff", b"\x7f\xc0", b"\x00\x00\x80\x7f"]) * 16
            frame = bytearray(forge(frame, length=len(frame) - 68))
        elif kind == 8:  # numbers of any length
            at = rng.randrange(len(frame) + 1)
            frame[at:at] = b"\xff" * rng.randint(1, 12)
        elif kind == 9 and len(frame) >= 68:  # lengths of 2^60 and the like, announced rightly
            at = rng.choice([68, 69, 70, rng.randrange(68, len(frame) + 1)])
            wild = varint(rng.choice([2**60, 2**32, 2**31, 2**62 - 1, rng.getrandbits(60)]))
            replaced = rng.choice([0, 1, 2, len(wild)])
            frame[at : at + replaced] = wild
            frame = bytearray(forge(frame, length=len(frame) - 68))
        else:  # noise
            frame = bytearray(rng.randbytes(rng.randint(0, 200)))
        forged[which] = bytes(frame)
        if rng.random() < 0.3:
            rng.shuffle(forged)
        if rng.random() < 0.1:
            forged.append(rng.choice(forged))
    return b"".join(forged)
