"""Make a real node a faulty one: Python imports this at the start of each of its processes.

Put on a node's PYTHONPATH, and only there: the app that the server sends is the same for all. The
fault is named by $FAULT; `fedpet.client.node` is changed when the app imports it.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any


class Spoiler(importlib.abc.MetaPathFinder):
    """Finds `fedpet.client.node` as ever, and spoils it once it is loaded."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "fedpet.client.node":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        honest = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            honest(module)
            spoil(module, os.environ["FAULT"])

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def spoil(client: Any, fault: str) -> None:
    """Change what a node answers: to a train message, or to the roll call."""
    import numpy as np

    from fedpet.protocol.frame import Refusal, pack_frame, pack_refusal, unpack_frames
    from fedpet.protocol.registration import decode_registration, encode_registration
    from fedpet.protocol.request import read_request

    honest = client.Node.answer

    def changed(frame: Any) -> bytes:
        if isinstance(frame, Refusal):  # of another checkpoint, say: it stays as it is
            return pack_refusal(frame)
        if fault == "nan":
            payload = np.full(frame.count, np.nan, dtype="<f4").tobytes()
            return pack_frame(replace(frame, payload=payload))
        if fault == "length":
            return pack_frame(replace(frame, count=frame.count - 1))
        if fault == "stale":
            return pack_frame(replace(frame, server_round=frame.server_round - 1))
        if fault == "duplicate":
            return pack_frame(frame) * 2
        if fault == "inflates":
            return pack_frame(replace(frame, num_examples=2**32 - 1, loss=0.0))
        return pack_frame(frame)

    def changed_roll_call(answer: bytes) -> bytes:
        kind, _, argument = fault.partition(":")
        if kind not in ("inflates", "squats", "multiplies"):
            return answer
        said = decode_registration(answer)
        lie = {argument: 8}
        if kind == "inflates":
            lie = dict.fromkeys(said.num_rows, 2**32 - 1)
        elif kind == "multiplies":
            lie = {f"made up {n}": 8 for n in range(int(argument))}
        return encode_registration(lie, said.versions)

    def answer(node: Any, payload: bytes) -> bytes:
        if not read_request(payload).clients:
            return changed_roll_call(honest(node, payload))
        if fault == "raises":
            raise RuntimeError("this device is out of order")
        if fault == "hangs":
            Path(os.environ["HANGS_AT"]).touch()
            time.sleep(3600)
        if fault.startswith("floods:"):
            return os.urandom(int(fault.partition(":")[2]) << 20)
        whole = honest(node, payload)
        frames = unpack_frames(whole, max_frames=99, max_payload_bytes=len(whole))
        return b"".join(changed(frame) for frame in frames)

    client.Node.answer = answer


if os.environ.get("FAULT"):
    sys.meta_path.insert(0, Spoiler())
