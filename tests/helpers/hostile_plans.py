"""Plans of a hostile server, and the limit that a device refuses each by."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import zstandard

from fedpet.protocol.plan import Plan


def opened(size: int) -> bytes:
    """A plan of kilobytes whose header opens to `size` bytes."""
    header = b'{"fingerprint":["' + b'",""' * (size // 4)
    packed = zstandard.ZstdCompressor(level=19).compress(header)
    assert len(packed) < 20_000
    return msgspec.msgpack.encode(["FPLN2", packed, b""])


def hostile(plan: Plan, case: str) -> bytes:
    if case == "rank":
        [first, *_] = plan.structure.modules
        lora = replace(first, kind="lora", rank=10**7)
        return replace(plan, structure=replace(plan.structure, modules=(lora,))).to_bytes()
    if case == "classes":
        names = tuple(f"c{n}" for n in range(250_000))
        return replace(plan, task=replace(plan.task, label_names=names)).to_bytes()
    if case == "epochs":
        return replace(plan, training=replace(plan.training, local_epochs=10**9)).to_bytes()
    if case == "batch":
        return replace(plan, training=replace(plan.training, batch_size=10**9)).to_bytes()
    if case == "threads":
        return replace(plan, training=replace(plan.training, threads=1024)).to_bytes()
    if case == "values":
        return replace(plan, num_values=10**12).to_bytes()
    return opened(12 << 20)


CASES = {
    "rank": "asks for 10000000 as rank, and this node gives max-rank = 1024",
    "classes": "a plan's header has at most 2097152 bytes",
    "epochs": "asks for 1000000000 epochs, and this node gives max-epochs = 100",
    "batch": "tokens of a batch, and this node gives max-batch-tokens",
    "threads": "asks for 1024 threads",
    "values": "asks for 1000000000000 communicated values",
    "opens": "a plan's header has at most 2097152 bytes",
}
