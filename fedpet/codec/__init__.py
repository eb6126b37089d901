"""Values to bytes and back: sparsify, rotate, quantise, entropy-code, frame.

    backbone -> mask -> structure -> search -> model -> [codec]
             -> plan -> client -> strategy -> ledger -> report

In:  a model's communicated values, float32 (n,), and the groups that are scaled apart.
Out: bytes, near the entropy of what the codec keeps; and the values again, or a `FrameError`.
"""

from __future__ import annotations

from fedpet.codec.feedback import encode_with_feedback
from fedpet.codec.frame import Frame, Refusal, pack_frame, pack_refusal, unpack_frames
from fedpet.codec.names import check_codec, known_codecs
from fedpet.codec.pipeline import decode_values, encode_values, max_payload_bytes
from fedpet.codec.positions import decode_positions, encode_positions

__all__ = [
    "Frame",
    "Refusal",
    "check_codec",
    "decode_positions",
    "decode_values",
    "encode_positions",
    "encode_values",
    "encode_with_feedback",
    "known_codecs",
    "max_payload_bytes",
    "pack_frame",
    "pack_refusal",
    "unpack_frames",
]
