"""Encode vectors into bytes and decode them: sparsify, rotate, quantise, entropy-code.

In:  a model's communicated values, float32 (n,), and the groups that are scaled apart.
Out: bytes, near the entropy of the quantised values; and the values again, or a `FrameError`.

Decoding gives the values back up to the error that a codec states:

    float32           none, to the bit
    bfloat16          below 2^-7 of each value; unbiased
    int8, int4        below one scale of each value, 1/127 or 1/7 of its block's largest; unbiased
    dither-8 ... 1    4.0e-5, 1.6e-4, 6.2e-4, 0.0025, 0.0094, 0.035, 0.132, 0.563 of the vector's
                      squared norm, whatever the vector; unbiased, and the mean of many errs less
    eden-8 ... 1      4.1e-5, 1.6e-4, 6.4e-4, 0.0025, 0.0096, 0.036, 0.133, 0.571 likewise; unbiased
                      over rotations, so that each sender needs its own
    topk-F+...        the values left out besides; biased, and made for error feedback

Bits and times of each are measured by `python -m benchmarks.codec_throughput`.

No result depends on a number of threads or on BLAS: the same values, codec, groups and seed give
the same bytes on one type of machine, and the same bytes decode to the same bits on every one.
"""

from __future__ import annotations

from fedpet.codec.error_feedback import encode_with_feedback
from fedpet.codec.index_coding import decode_positions, encode_positions
from fedpet.codec.pipeline import decode_values, encode_values, max_payload_bytes
from fedpet.codec.spec import check_codecs, parse_codec
from fedpet.codec.vector_codec import VectorCodec
from fedpet.codec.vector_sum import VectorSum
from fedpet.codec.vector_types import Seeds

__all__ = [
    "Seeds",
    "VectorCodec",
    "VectorSum",
    "check_codecs",
    "decode_positions",
    "decode_values",
    "encode_positions",
    "encode_values",
    "encode_with_feedback",
    "max_payload_bytes",
    "parse_codec",
]
