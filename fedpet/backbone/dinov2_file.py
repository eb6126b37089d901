"""Convert a DINOv2 encoder inside an ONNX file into a checkpoint of safetensors.

In:  a .onnx file that torch has exported, whose encoder was transformers' Dinov2Model under the
     name "backbone".
Out: a folder as `save_pretrained` writes it: configuration, weights, image processor.

Parameters stand in the file under their own names, but those of Linear layers, which are transposed
and nameless: the node that multiplies by one names its layer. The positions are the constant that
the node "embeddings/Reshape_1" reads, and that of the class token the one that is joined to it.
What follows the encoder is left out. A mask token, of which inference has none, is zeros.

An ONNX file is a message of protocol buffers, whose few fields read here are ModelProto.graph,
GraphProto.node and .initializer. The package onnx would be a dependency of 15 MB for one model.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedpet.backbone.converted import converted_once, hash_of, save_tensors
from fedpet.errors import BackboneError, InputError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ONNX_SUFFIX", "convert_dinov2"]

ONNX_SUFFIX = ".onnx"
_FORMAT = 1
_PREFIX = "backbone."
_TYPES = {1: "<f4", 7: "<i8"}  # TensorProto.DataType
# Parts of names in the file, which are those that `save_pretrained` writes, and in memory.
_RENAMED = {
    ".attention.attention.query.": ".attention.q_proj.",
    ".attention.attention.key.": ".attention.k_proj.",
    ".attention.attention.value.": ".attention.v_proj.",
    ".attention.output.dense.": ".attention.o_proj.",
}
_LAYER = re.compile(r"/backbone/(encoder/layer\.\d+/.*)/MatMul")


def convert_dinov2(file: Path, source: str, *, dtype: str) -> Path:
    """Return the folder of an ONNX file's encoder.

    Args:
        file: The file.
        source: As the user named it, for messages.
        dtype: Of the weights, "float32" or "bfloat16".

    Raises:
        BackboneError: It holds no such encoder, or the cache cannot be written.
    """
    return converted_once(
        file.stem,
        dtype=dtype,
        sha256=hash_of(file),
        version=_FORMAT,
        convert=lambda building: _convert(file, source, building, dtype),
    )


def _convert(file: Path, source: str, folder: Path, dtype: str) -> None:
    from transformers import Dinov2Model

    try:
        tensors = _tensors(memoryview(file.read_bytes()))
        config = _config(tensors)
    except (InputError, OSError):
        raise
    except Exception as error:  # a message that is cut short, a name that is not there
        raise BackboneError(
            f"{source!r} could not be read as an ONNX file of a DINOv2 encoder "
            f"({type(error).__name__}: {error})."
        ) from None
    what = f"the ONNX file of {source!r}"
    save_tensors(tensors, Dinov2Model, config, folder, dtype=dtype, what=what)
    (folder / "preprocessor_config.json").write_text(json.dumps(_PROCESSOR, indent=2) + "\n")


def _tensors(content: memoryview) -> dict[str, Tensor]:
    """Return the encoder's tensors under transformers' names."""
    import torch

    graph = next(value for number, value in _fields(content) if number == 7)
    arrays, readers = {}, {}
    for number, value in _fields(graph):
        if number == 5:
            name, array = _array(value)
            arrays[name] = array
        elif number == 1:
            node, inputs = _node(value)
            readers[node] = inputs
    found = {
        name.removeprefix(_PREFIX): array
        for name, array in arrays.items()
        if name.startswith(_PREFIX)
    }
    for node, inputs in readers.items():
        if layer := _LAYER.fullmatch(node):
            weights = [arrays[name] for name in inputs if name in arrays]
            if len(weights) == 1:
                found[f"{layer[1].replace('/', '.')}.weight"] = weights[0].T
    positions = [arrays[n] for n in readers["/backbone/embeddings/Reshape_1"] if n in arrays]
    [grid] = [array for array in positions if array.ndim == 3]
    width = grid.shape[2]
    of_class = [
        arrays[name]
        for node, inputs in readers.items()
        if node.startswith("/backbone/embeddings/Concat")
        for name in inputs
        if name in arrays and arrays[name].shape == (1, 1, width)
    ]
    [first] = [array for array in of_class if array is not arrays["backbone.embeddings.cls_token"]]
    found["embeddings.position_embeddings"] = np.concatenate([first, grid], 1)
    found["embeddings.mask_token"] = np.zeros((1, width), dtype=np.float32)
    for theirs, ours in _RENAMED.items():
        found = {name.replace(theirs, ours): array for name, array in found.items()}
    return {name: torch.from_numpy(array.astype(np.float32)) for name, array in found.items()}


def _config(tensors: dict[str, Tensor]) -> Any:
    """Make the configuration of shapes; heads have 64 numbers, as in all of DINOv2."""
    from transformers import Dinov2Config

    projection = tensors["embeddings.patch_embeddings.projection.weight"]
    width, channels, patch, _ = projection.shape
    layers = {name.split(".")[2] for name in tensors if name.startswith("encoder.layer.")}
    positions = tensors["embeddings.position_embeddings"].shape[1] - 1
    return Dinov2Config(
        hidden_size=width,
        num_hidden_layers=len(layers),
        num_attention_heads=width // 64,
        mlp_ratio=len(tensors["encoder.layer.0.mlp.fc1.bias"]) // width,
        image_size=math.isqrt(positions) * patch,
        patch_size=patch,
        num_channels=channels,
    )


# The processor that DINOv2's own checkpoints come with.
_PROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


# Protocol buffers: a field is its number and kind, then a number, or a length and bytes.


def _fields(content: memoryview) -> Iterator[tuple[int, Any]]:
    """Yield the number and the value of each field of a message."""
    place = 0
    while place < len(content):
        key, place = _varint(content, place)
        if key & 7 == 0:
            value, place = _varint(content, place)
            yield key >> 3, value
            continue
        size = {1: 8, 5: 4}.get(key & 7)
        if size is None:
            size, place = _varint(content, place)
        yield key >> 3, content[place : place + size]
        place += size


def _varint(content: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[place]
        place += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, place


def _array(message: memoryview) -> tuple[str, np.ndarray]:
    """Read a TensorProto that holds raw bytes; of another the shape alone matters, and is ()."""
    shape: list[int] = []
    name, kind, raw = "", 0, memoryview(b"")
    for number, value in _fields(message):
        if number == 1 and isinstance(value, int):
            shape.append(value)
        elif number == 1:
            place = 0
            while place < len(value):
                size, place = _varint(value, place)
                shape.append(size)
        elif number == 2:
            kind = value
        elif number == 8:
            name = bytes(value).decode()
        elif number == 9:
            raw = value
    if kind not in _TYPES or not len(raw):
        return name, np.empty(0, dtype=np.float32)
    return name, np.frombuffer(raw, _TYPES[kind]).reshape(shape)


def _node(message: memoryview) -> tuple[str, list[str]]:
    """Return the name of a NodeProto and its inputs."""
    name, inputs = "", []
    for number, value in _fields(message):
        if number == 1:
            inputs.append(bytes(value).decode())
        elif number == 3:
            name = bytes(value).decode()
    return name, inputs
