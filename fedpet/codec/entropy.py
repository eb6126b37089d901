"""Compress bytes and symbols near their entropy, and read them back without trust.

In:  byte planes, and streams of small symbols.
Out: sections: one mode byte, a length where it is not known beforehand, the data.

Two entropy stages, chosen by measurement on one core (1 M values):

* bytes (planes of floats, tables) go through `zstandard` at level 1, of which only the Huffman
  stage helps here; a plane that does not shrink is stored as it is;
* symbols of quantisers go through `constriction`'s asymmetric numeral system (rANS) under a table
  of their own frequencies. rANS keeps one integer x as its state and pushes a symbol of frequency f
  out of M onto it as x -> (x // f) M + (x mod f) + c, c being the frequencies before it: x grows by
  the factor M / f, so a symbol costs log2(M / f) bits, fractions included. That is within 0.1 % of
  the empirical entropy, where Huffman codes of symbol pairs stay 0.5 to 1.3 % above it, and far
  above it once most symbols are zero.

Reading trusts nothing: how many values there are is known from the plan, every length is held
against the bytes that are there, and nothing is allocated by a number that the sender wrote.

Reference: Duda, arXiv:1311.2540 (asymmetric numeral systems); Bamler, arXiv:2201.01741
(constriction).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from fedpet.errors import FrameError

Bytes = npt.NDArray[np.uint8]

_STORED, _ZSTD, _ANS = 0, 1, 2

# Without magic number, content size and checksum: the reader knows the size. A decoder allocates
# the window that a frame asks for, so ours is small, and no larger one is accepted.
_WINDOW_LOG = 17
_PARAMETERS = zstandard.ZstdCompressionParameters.from_level(
    1,
    window_log=_WINDOW_LOG,
    write_content_size=False,
    write_checksum=False,
    write_dict_id=False,
    format=zstandard.FORMAT_ZSTD1_MAGICLESS,
)

# 2^24 · 2^(-j/4): frequencies fall by quarter octaves, so a symbol's takes one byte. The rounding
# costs 0.002 bits a symbol. In integers, so that all machines decode under the same model.
_QUARTER_OCTAVES = np.array([16777216, 14107901, 11863283, 9975793], dtype=np.int64)
_RAREST = 96


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
        # A new compressor each time: they are not safe to share between threads, and cost 1 µs.
        packed = zstandard.ZstdCompressor(compression_params=_PARAMETERS).compress(plane.data)
        length = varint(len(packed))
        if len(packed) + len(length) < len(plane):
            return bytes([_ZSTD]) + length + packed
    return bytes([_STORED]) + plane.tobytes()


def unpack_bytes(reader: Reader, num_bytes: int) -> Bytes:
    """Read a plane of `num_bytes` bytes: uint8 (num_bytes,), perhaps read-only.

    Raises:
        FrameError: It is not such a plane.
    """
    mode = reader.take(1)[0]
    if mode == _STORED:
        return np.frombuffer(reader.take(num_bytes), dtype=np.uint8)
    if mode != _ZSTD:
        raise FrameError(f"a plane of bytes is stored (0) or compressed (1), got mode {mode}.")
    packed = reader.take(reader.varint())
    # A frame may declare the size of its content, and the library would allocate that much. Ours
    # do not: the descriptor is 0, and the output is as large as the plan says.
    if not packed or packed[0] != 0:
        raise FrameError("a compressed plane must not declare a size of its own: this one does.")
    decompressor = zstandard.ZstdDecompressor(
        max_window_size=1 << _WINDOW_LOG, format=zstandard.FORMAT_ZSTD1_MAGICLESS
    )
    try:
        plane = decompressor.decompress(
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
    bits = (alphabet - 1).bit_length()
    most = stored_bytes(len(symbols), alphabet)
    if entropy and len(symbols):
        counts = np.bincount(symbols, minlength=alphabet)
        table = _frequency_table(counts)
        packed_table = pack_bytes(table)
        coded_bits = -counts[counts > 0] @ np.log2(_model_probabilities(table)[counts > 0])
        if len(packed_table) + coded_bits / 8 + 8 < 0.995 * most:
            words = _ans_encode(symbols, table)
            coded = bytes([_ANS]) + packed_table + varint(len(words) // 4) + words
            if len(coded) < 1 + most:
                return coded
    if bits == 8:
        return bytes([_STORED]) + symbols.tobytes()
    return bytes([_STORED]) + pack_planes(symbols, bits)


def unpack_symbols(reader: Reader, count: int, alphabet: int) -> Bytes:
    """Read `count` symbols below `alphabet`: uint8 (count,), perhaps read-only.

    Raises:
        FrameError: They are not such symbols.
    """
    mode = reader.take(1)[0]
    if mode == _STORED:
        bits = (alphabet - 1).bit_length()
        symbols: Bytes = (
            np.frombuffer(reader.take(count), dtype=np.uint8)
            if bits == 8
            else unpack_planes(reader, count, bits, np.uint8)
        )
        if alphabet < 1 << bits and count and symbols.max() >= alphabet:
            raise FrameError(f"symbols must be below {alphabet}, got {symbols.max()}.")
        return symbols
    if mode != _ANS:
        raise FrameError(f"symbols are stored (0) or entropy-coded (2), got mode {mode}.")
    table = unpack_bytes(reader, alphabet)
    if not table.any() or table.max() > _RAREST:
        raise FrameError(
            f"a table of frequencies holds numbers up to {_RAREST} of which one is not 0, got one "
            f"with the maximum {table.max()}."
        )
    words = np.frombuffer(reader.take(4 * reader.varint()), dtype="<u4")
    return _ans_decode(words, table, count)


def _frequency_table(counts: npt.NDArray[np.int64]) -> Bytes:
    """Return counts in quarter octaves below the largest, plus 1; 0 for symbols that are absent."""
    table = np.zeros(len(counts), dtype=np.uint8)
    present = counts > 0
    octaves = np.log2(counts.max() / counts[present])
    table[present] = np.minimum(np.rint(4 * octaves) + 1, _RAREST)
    return table


def _frequencies(table: Bytes) -> npt.NDArray[np.float32]:
    quarters = table.astype(np.int64) - 1
    frequencies = _QUARTER_OCTAVES[quarters % 4] >> (quarters // 4).clip(0)
    return np.where(table > 0, frequencies, 0).astype(np.float32)  # integers up to 2^24: exact


def _model_probabilities(table: Bytes) -> npt.NDArray[np.float64]:
    frequencies = _frequencies(table).astype(np.float64)
    return frequencies / frequencies.sum()  # type: ignore[no-any-return]


def _ans_model(table: Bytes) -> Any:
    from constriction import stream  # here, for those who send floats only

    return stream.model.Categorical(_frequencies(table), lazy=False, perfect=False)


def _ans_encode(symbols: Bytes, table: Bytes) -> bytes:
    from constriction import stream

    coder = stream.stack.AnsCoder()
    coder.encode_reverse(symbols.astype(np.int32), _ans_model(table))
    return coder.get_compressed().astype("<u4").tobytes()  # type: ignore[no-any-return]


def _ans_decode(words: npt.NDArray[np.uint32], table: Bytes, count: int) -> Bytes:
    from constriction import stream

    try:
        coder = stream.stack.AnsCoder(words.astype(np.uint32))
        symbols = coder.decode(_ans_model(table), count)
    except ValueError as error:
        raise FrameError(f"entropy-coded symbols are damaged: {error}") from None
    if not coder.is_empty():
        raise FrameError(f"entropy-coded symbols must end with the {count}th: more bits follow.")
    return symbols.astype(np.uint8)  # type: ignore[no-any-return]
