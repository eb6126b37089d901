"""Compress bytes and symbols near their entropy, and read them back without trust.

In:  byte planes, and streams of small symbols.
Out: sections: one mode byte, a length where it is not known beforehand, the data.

Both go through the Huffman stage of `zstandard`: level 1, told to look for long matches alone,
which finds runs of zeros and leaves the rest to the Huffman code. A Huffman code spends at least a
bit on each byte, so symbols of a small alphabet are written several to a byte first, as its digits:
two of up to 16 symbols, four of up to 4. That is 0.7 to 1.5 % above the entropy of a quantiser's
symbols, at a tenth of an arithmetic coder's time; where most symbols are zero it can be far above.
What does not shrink is stored as it is.

Reading trusts nothing: how many values there are is known from the plan, every length is held
against the bytes that are there, and nothing is allocated by a number that the sender wrote.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from fedpet.errors import FrameError

Bytes = npt.NDArray[np.uint8]

_STORED, _ZSTD = 0, 1

# Without magic number, content size and checksum: the reader knows the size. A decoder allocates
# the window that a frame asks for, so ours is small, and no larger one is accepted.
_WINDOW_LOG = 17
_PARAMETERS = zstandard.ZstdCompressionParameters.from_level(
    1,
    window_log=_WINDOW_LOG,
    min_match=7,
    hash_log=6,
    write_content_size=False,
    write_checksum=False,
    write_dict_id=False,
    format=zstandard.FORMAT_ZSTD1_MAGICLESS,
)


class Reader:
    """Read a payload from the front, and refuse to go beyond its end."""

    def __init__(self, payload: bytes | memoryview) -> None:
        self._view = memoryview(payload)
        self._offset = 0

    def take(self, num_bytes: int) -> memoryview:
        """Return the next `num_bytes` bytes, not copied."""
        left = len(self._view) - self._offset
        if num_bytes > left:
            raise FrameError(
                f"a payload must hold what its plan and codec ask for: {num_bytes} more bytes are "
                f"due at byte {self._offset}, {left} are there."
            )
        self._offset += num_bytes
        return self._view[self._offset - num_bytes : self._offset]

    def rest(self) -> memoryview:
        """Return the rest, not copied."""
        return self.take(len(self._view) - self._offset)

    def varint(self) -> int:
        """Return the next number, seven bits a byte, the low ones first."""
        value = 0
        for shift in range(0, 63, 7):
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if byte == 0 and shift:
                    break
                return value
        raise FrameError(
            f"a number in a payload takes as few bytes as it needs, at most nine: the one that "
            f"ends at byte {self._offset} does not."
        )

    def unary(self, count: int, *, most_zeros: int) -> npt.NDArray[np.int64]:
        """Return the next `count` numbers in unary, zeros ended by a one, int64 (count,).

        Args:
            count: Number of numbers; the bits behind the last one fill up its byte and are zero.
            most_zeros: The largest sum of the numbers.
        """
        most_bytes = (count + most_zeros + 7) // 8
        window = self._view[self._offset : self._offset + most_bytes]
        bits = np.unpackbits(np.frombuffer(window, dtype=np.uint8), bitorder="little")
        ones = np.flatnonzero(bits)[:count]
        if len(ones) < count:
            raise FrameError(
                f"{count} numbers in unary are due at byte {self._offset}, within {most_bytes} "
                f"bytes: {len(ones)} are there."
            )
        num_bytes = int(ones[-1]) // 8 + 1 if count else 0
        if count and bits[ones[-1] + 1 : 8 * num_bytes].any():
            raise FrameError("bits that fill up a byte must be zero: a unary stream's are not.")
        self._offset += num_bytes
        return np.diff(ones, prepend=-1) - 1

    def end(self) -> None:
        """Refuse anything that is left."""
        left = len(self._view) - self._offset
        if left:
            raise FrameError(
                f"a payload must end with its last value: {left} bytes follow byte {self._offset}."
            )


def varint(value: int) -> bytes:
    """Write a number seven bits a byte, the low ones first."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def pack_bytes(plane: Bytes, *, entropy: bool = True) -> bytes:
    """Write a plane of bytes, compressed where that is shorter.

    Args:
        plane: uint8 (n,), contiguous. The reader knows n.
        entropy: False stores it as it is.
    """
    if entropy and len(plane):
        coded = _compress(plane)
        if len(coded) < 1 + len(plane):
            return coded
    return bytes([_STORED]) + plane.tobytes()


def unpack_bytes(reader: Reader, num_bytes: int) -> Bytes:
    """Read a plane of `num_bytes` bytes: uint8 (num_bytes,), perhaps read-only.

    Raises:
        FrameError: It is not such a plane.
    """
    mode = reader.take(1)[0]
    if mode == _STORED:
        return np.frombuffer(reader.take(num_bytes), dtype=np.uint8)
    if mode == _ZSTD:
        return _decompress(reader, num_bytes)
    raise FrameError(f"a plane of bytes is stored (0) or compressed (1), got mode {mode}.")


class _Contexts(threading.local):
    """zstandard's state, for each thread its own: making it takes longer than a small plane."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(compression_params=_PARAMETERS)
        self.decompressor = zstandard.ZstdDecompressor(
            max_window_size=1 << _WINDOW_LOG, format=zstandard.FORMAT_ZSTD1_MAGICLESS
        )


_CONTEXTS = _Contexts()


def _compress(plane: Bytes) -> bytes:
    packed = _CONTEXTS.compressor.compress(plane.data)
    return b"".join((bytes([_ZSTD]), varint(len(packed)), packed))


def _decompress(reader: Reader, num_bytes: int) -> Bytes:
    packed = reader.take(reader.varint())
    # A frame may declare the size of its content, and the library would allocate that much. Ours
    # do not: the descriptor is 0, and the output is as large as the plan says.
    if not packed or packed[0] != 0:
        raise FrameError("a compressed plane must not declare a size of its own: this one does.")
    try:
        plane = _CONTEXTS.decompressor.decompress(
            packed, max_output_size=max(num_bytes, 1), allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise FrameError(f"a compressed plane of {num_bytes} bytes is damaged: {error}.") from None
    if len(plane) != num_bytes:
        raise FrameError(f"a plane must hold {num_bytes} bytes, this one holds {len(plane)}.")
    return np.frombuffer(plane, dtype=np.uint8)


def pack_planes(numbers: npt.NDArray[np.unsignedinteger[Any]], bits: int) -> bytes:
    """Write the low `bits` bits of each number, a plane of bits at a time, the low ones first."""
    return b"".join(
        np.packbits((numbers >> shift & 1).astype(np.uint8), bitorder="little").tobytes()
        for shift in range(bits)
    )


def unpack_planes(
    reader: Reader, count: int, bits: int, dtype: type[np.unsignedinteger[Any]]
) -> npt.NDArray[Any]:
    """Read `count` numbers of `bits` bits each. Bits that fill up a byte must be zero."""
    planes = reader.take((count + 7) // 8 * bits)
    numbers = np.zeros(count, dtype=dtype)
    for shift in range(bits):
        plane = np.frombuffer(planes, dtype=np.uint8).reshape(bits, -1)[shift]
        if count % 8 and plane[-1] >> count % 8:
            raise FrameError("bits that fill up a byte must be zero: a plane's last ones are not.")
        numbers |= np.unpackbits(plane, count=count, bitorder="little").astype(dtype) << dtype(
            shift
        )
    return numbers


def stored_bytes(count: int, alphabet: int) -> int:
    """Return the bytes of `count` symbols at a fixed number of bits."""
    bits = (alphabet - 1).bit_length()
    return count if bits == 8 else (count + 7) // 8 * bits


def pack_symbols(symbols: Bytes, alphabet: int, *, entropy: bool = True) -> bytes:
    """Write symbols below `alphabet`, entropy-coded where that is shorter.

    Args:
        symbols: uint8 (n,). The reader knows n.
        alphabet: Number of symbols, 2 to 256.
        entropy: False stores them at a fixed number of bits.
    """
    if entropy and len(symbols):
        coded = _compress(_join_digits(symbols, alphabet))
        if len(coded) < 1 + stored_bytes(len(symbols), alphabet):
            return coded
    bits = (alphabet - 1).bit_length()
    if bits == 8:
        return bytes([_STORED]) + symbols.tobytes()
    return bytes([_STORED]) + pack_planes(symbols, bits)


def unpack_symbols(reader: Reader, count: int, alphabet: int) -> Bytes:
    """Read `count` symbols below `alphabet`: uint8 (count,), perhaps read-only.

    Raises:
        FrameError: They are not such symbols.
    """
    mode = reader.take(1)[0]
    if mode == _ZSTD:
        num_bytes = -(-count // _num_digits(alphabet))
        return _split_digits(_decompress(reader, num_bytes), count, alphabet)
    if mode != _STORED:
        raise FrameError(f"symbols are stored (0) or compressed (1), got mode {mode}.")
    bits = (alphabet - 1).bit_length()
    if bits == 8:
        symbols: Bytes = np.frombuffer(reader.take(count), dtype=np.uint8)
    else:
        symbols = unpack_planes(reader, count, bits, np.uint8)
    _check_below(symbols, alphabet)
    return symbols


def _num_digits(alphabet: int) -> int:
    """Return how many symbols a byte holds: as many as give no more than 256 combinations."""
    return max(num for num in (1, 2, 4, 8) if num == 1 or alphabet**num <= 256)


def _join_digits(symbols: Bytes, alphabet: int) -> Bytes:
    """Write symbols as the digits of bytes, the first one lowest; zeros fill up the last byte."""
    while _num_digits(alphabet) > 1:
        if len(symbols) % 2:
            symbols = np.append(symbols, np.uint8(0))
        pairs = symbols.view("<u2")
        upper = (pairs >> np.uint16(8)) * np.uint16(alphabet)
        symbols, alphabet = ((pairs & np.uint16(0xFF)) + upper).astype(np.uint8), alphabet**2
    return symbols


def _split_digits(packed: Bytes, count: int, alphabet: int) -> Bytes:
    """Read `count` symbols out of bytes."""
    num = _num_digits(alphabet)
    _check_below(packed, alphabet**num)
    symbols = packed
    while num > 1:
        num //= 2
        pairs = symbols.astype("<u2")  # lower + alphabet^num · upper
        pairs += pairs // np.uint16(alphabet**num) * np.uint16(256 - alphabet**num)
        symbols = pairs.view(np.uint8)
    if symbols[count:].any():
        raise FrameError("symbols that fill up a byte must be zero: the last ones are not.")
    return symbols[:count]


def _check_below(symbols: Bytes, alphabet: int) -> None:
    if alphabet < 256 and len(symbols) and symbols.max() >= alphabet:
        raise FrameError(f"symbols must be below {alphabet}, got {symbols.max()}.")
