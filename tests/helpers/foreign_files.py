"""Write a Whisper as CTranslate2 does and a DINOv2 as torch's ONNX export, to be read back."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

ADDED = ["<|endoftext|>", "<|startoftranscript|>"]


def write_whisper(model: Any, folder: Path, *, key_bias: float = 0.0) -> Path:
    """Write model.bin in float16, and a tokeniser of words with Whisper's special tokens."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    arrays: dict[str, np.ndarray] = {}

    def norm(theirs: str, ours: str) -> None:
        arrays[f"{theirs}/gamma"] = state[f"{ours}.weight"]
        arrays[f"{theirs}/beta"] = state[f"{ours}.bias"]

    def linear(theirs: str, *ours: str) -> None:
        arrays[f"{theirs}/weight"] = np.concatenate([state[f"{one}.weight"] for one in ours])
        arrays[f"{theirs}/bias"] = np.concatenate(
            [state.get(f"{one}.bias", np.full(len(state[f"{one}.weight"]), key_bias))
             for one in ours]
        )  # fmt: skip

    for stack, config in (("encoder", model.config.encoder_layers),
                          ("decoder", model.config.decoder_layers)):  # fmt: skip
        arrays[f"{stack}/num_heads"] = np.array(model.config.encoder_attention_heads, "<i2")
        positions = state[f"model.{stack}.embed_positions.weight"]
        arrays[f"{stack}/position_encodings/encodings"] = positions
        norm(f"{stack}/layer_norm", f"model.{stack}.layer_norm")
        for layer in range(config):
            theirs, ours = f"{stack}/layer_{layer}", f"model.{stack}.layers.{layer}"
            own = f"{ours}.self_attn"
            norm(f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm")
            linear(f"{theirs}/self_attention/linear_0", *(f"{own}.{x}_proj" for x in "qkv"))
            linear(f"{theirs}/self_attention/linear_1", f"{own}.out_proj")
            if stack == "decoder":
                cross = f"{ours}.encoder_attn"
                norm(f"{theirs}/attention/layer_norm", f"{ours}.encoder_attn_layer_norm")
                linear(f"{theirs}/attention/linear_0", f"{cross}.q_proj")
                linear(f"{theirs}/attention/linear_1", f"{cross}.k_proj", f"{cross}.v_proj")
                linear(f"{theirs}/attention/linear_2", f"{cross}.out_proj")
            norm(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
            linear(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
            linear(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
    for conv in ("conv1", "conv2"):
        for part in ("weight", "bias"):
            arrays[f"encoder/{conv}/{part}"] = state[f"model.encoder.{conv}.{part}"]
    arrays["decoder/embeddings/weight"] = state["model.decoder.embed_tokens.weight"]
    folder.mkdir(parents=True)
    content = struct.pack("<I", 6) + _text("WhisperSpec") + struct.pack("<II", 3, len(arrays))
    for name, array in arrays.items():
        kind = 2 if array.dtype == np.int16 else 4
        raw = array.astype("<f2" if kind == 4 else "<i2").tobytes()
        content += _text(name) + struct.pack("<B", array.ndim)
        content += struct.pack(f"<{array.ndim}I", *array.shape)
        content += struct.pack("<BI", kind, len(raw)) + raw
    (folder / "model.bin").write_bytes(content + struct.pack("<I", 0))
    _write_tokenizer(folder)
    return folder / "model.bin"


def _text(text: str) -> bytes:
    raw = text.encode() + b"\0"
    return struct.pack("<H", len(raw)) + raw


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: index for index, word in enumerate([*ADDED, "good", "film"])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(ADDED)
    (folder / "tokenizer.json").write_text(json.dumps(json.loads(made.to_str())))


def write_dinov2(model: Any, file: Path) -> Path:
    """Write the encoder's graph as far as its weights tell of it."""
    state = model.state_dict()
    renamed = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value",
               "o_proj": "output.dense"}  # fmt: skip
    graph, count = b"", 0
    positions = state["embeddings.position_embeddings"].numpy()
    for name, part, node in (("class", positions[:, :1], "Concat_1"),
                             ("grid", positions[:, 1:], "Reshape_1")):  # fmt: skip
        graph += _initializer(f"onnx::{name}", part)
        graph += _node_of(f"/backbone/embeddings/{node}", ["x", f"onnx::{name}"])
    for name, tensor in state.items():
        for ours, theirs in renamed.items():
            name = name.replace(f".attention.{ours}.", f".attention.{theirs}.")
        if name in ("embeddings.position_embeddings", "embeddings.mask_token"):
            continue
        if name.startswith("encoder") and tensor.dim() == 2:
            count += 1
            graph += _initializer(f"onnx::MatMul_{count}", tensor.numpy().T)
            node = f"/backbone/encoder/{'.'.join(name.split('.')[1:3])}/"
            node += "/".join(name.split(".")[3:-1]) + "/MatMul"
            graph += _node_of(node, ["x", f"onnx::MatMul_{count}"])
        else:
            graph += _initializer(f"backbone.{name}", tensor.numpy())
    file.write_bytes(_number(1, 7) + _bytes(2, b"pytorch") + _bytes(7, graph))
    return file


def _initializer(name: str, array: np.ndarray) -> bytes:
    raw = np.ascontiguousarray(array, "<f4").tobytes()
    shape = b"".join(_number(1, size) for size in array.shape)
    return _bytes(5, shape + _number(2, 1) + _bytes(8, name.encode()) + _bytes(9, raw))


def _node_of(name: str, inputs: list[str]) -> bytes:
    body = b"".join(_bytes(1, one.encode()) for one in inputs)
    return _bytes(1, body + _bytes(3, name.encode()))


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    found = b""
    while value > 127:
        found += bytes([value & 127 | 128])
        value >>= 7
    return found + bytes([value])
