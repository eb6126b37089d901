"""Convert a Whisper of CTranslate2 into a checkpoint of safetensors.

In:  a folder with model.bin and tokenizer.json, as faster-whisper reads it.
Out: a folder as `save_pretrained` writes it: configuration, weights, tokeniser, feature extractor.

The file is a list of named arrays, little-endian: a version, the model's kind, then for each its
name, its shape, its type and its bytes; and names that stand for another's. Weights are Linear's
own way round; the three of an attention lie in one, those of keys and values of a cross-attention
in another. Whisper's keys have no bias, and the file has zeros there: anything else is refused.

Source of the layout: CTranslate2's python/ctranslate2/specs/model_spec.py and its converter of
transformers' Whisper, which this reads the other way.
"""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedpet.backbone.converted import converted_once, hash_of, save_tensors
from fedpet.errors import BackboneError, InputError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["WHISPER_FILE", "convert_whisper"]

WHISPER_FILE = "model.bin"
_FORMAT = 1
_TYPES = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}  # of the file; others are quantised


def convert_whisper(file: Path, source: str, *, dtype: str) -> Path:
    """Return the folder of a CTranslate2 model's checkpoint.

    Args:
        file: Its model.bin, with tokenizer.json beside it.
        source: As the user named it, for messages.
        dtype: Of the weights, "float32" or "bfloat16".

    Raises:
        BackboneError: It is no such file, or no Whisper; or the cache cannot be written.
    """
    return converted_once(
        f"whisper-{file.parent.parent.name}",
        dtype=dtype,
        sha256=hash_of(file),
        version=_FORMAT,
        convert=lambda building: _convert(file, source, building, dtype),
    )


def _convert(file: Path, source: str, folder: Path, dtype: str) -> None:
    from transformers import WhisperForConditionalGeneration

    try:
        arrays = _read(file.read_bytes())
        config = _config(arrays, json.loads((file.parent / "tokenizer.json").read_bytes()))
    except (InputError, OSError):
        raise
    except Exception as error:  # struct, numpy and json each have their own
        raise BackboneError(
            f"{source!r} could not be read as a Whisper of CTranslate2 ({type(error).__name__}: "
            f"{error})."
        ) from None
    save_tensors(
        _renamed(arrays, source),
        WhisperForConditionalGeneration,
        config,
        folder,
        dtype=dtype,
        what=f"the file of {source!r}",
    )
    _save_readers(file.parent, folder, config)


def _read(content: bytes) -> dict[str, np.ndarray]:
    """Return the arrays of a file by name."""
    place = 0

    def number(kind: str) -> int:
        nonlocal place
        (found,) = struct.unpack_from(f"<{kind}", content, place)
        place += struct.calcsize(kind)
        return int(found)

    def text() -> str:
        nonlocal place
        length = number("H")
        found = content[place : place + length - 1].decode()  # a zero ends it
        place += length
        return found

    version, kind = number("I"), text()
    if kind != "WhisperSpec" or version < 5:
        raise ValueError(f"it holds a {kind!r}, version {version}")
    number("I")  # revision of the kind
    arrays = {}
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        kind_of, size = number("B"), number("I")
        if kind_of not in _TYPES:
            raise ValueError(f"{name} has the unknown type {kind_of}")
        arrays[name] = np.frombuffer(content, _TYPES[kind_of], size // int(_TYPES[kind_of][-1]),
                                     place).reshape(shape)  # fmt: skip
        place += size
    return arrays


def _config(arrays: dict[str, np.ndarray], tokenizer: dict[str, Any]) -> Any:
    """Make the configuration of shapes, and of the tokeniser's special tokens."""
    from transformers import WhisperConfig

    def layers(stack: str) -> int:
        return len({name.split("/")[1] for name in arrays if name.startswith(f"{stack}/layer_")} - {
            "layer_norm"})  # fmt: skip

    special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    width, bins, _ = arrays["encoder/conv1/weight"].shape
    end = special["<|endoftext|>"]
    return WhisperConfig(
        vocab_size=len(arrays["decoder/embeddings/weight"]),
        num_mel_bins=bins,
        d_model=width,
        encoder_layers=layers("encoder"),
        decoder_layers=layers("decoder"),
        encoder_attention_heads=int(arrays["encoder/num_heads"]),
        decoder_attention_heads=int(arrays["decoder/num_heads"]),
        encoder_ffn_dim=len(arrays["encoder/layer_0/ffn/linear_0/bias"]),
        decoder_ffn_dim=len(arrays["decoder/layer_0/ffn/linear_0/bias"]),
        max_source_positions=len(arrays["encoder/position_encodings/encodings"]),
        max_target_positions=len(arrays["decoder/position_encodings/encodings"]),
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=special["<|startoftranscript|>"],
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )


def _renamed(arrays: dict[str, np.ndarray], source: str) -> dict[str, Tensor]:
    """Return the tensors under the names that transformers has for them, float32."""
    import torch

    found: dict[str, Tensor] = {}

    def put(name: str, array: np.ndarray) -> None:
        found[f"model.{name}"] = torch.from_numpy(array.astype(np.float32))

    def norm(name: str, ours: str) -> None:
        put(f"{ours}.weight", arrays[f"{name}/gamma"])
        put(f"{ours}.bias", arrays[f"{name}/beta"])

    def linear(name: str, *ours: str) -> None:
        weights = np.split(arrays[f"{name}/weight"], len(ours))
        biases = np.split(arrays[f"{name}/bias"], len(ours))
        for one, weight, bias in zip(ours, weights, biases, strict=True):
            put(f"{one}.weight", weight)
            if not one.endswith("k_proj"):
                put(f"{one}.bias", bias)
            elif bias.any():
                raise BackboneError(
                    f"{source!r} has a bias on the keys {one!r}, and Whisper has none there."
                )

    def attention(name: str, ours: str, after: str) -> None:
        norm(f"{name}/layer_norm", after)
        if f"{name}/linear_2/weight" in arrays:
            linear(f"{name}/linear_0", f"{ours}.q_proj")
            linear(f"{name}/linear_1", f"{ours}.k_proj", f"{ours}.v_proj")
            linear(f"{name}/linear_2", f"{ours}.out_proj")
        else:
            linear(f"{name}/linear_0", *(f"{ours}.{part}_proj" for part in "qkv"))
            linear(f"{name}/linear_1", f"{ours}.out_proj")

    for conv in ("conv1", "conv2"):
        for part in ("weight", "bias"):
            put(f"encoder.{conv}.{part}", arrays[f"encoder/{conv}/{part}"])
    put("decoder.embed_tokens.weight", arrays["decoder/embeddings/weight"])
    for stack in ("encoder", "decoder"):
        put(f"{stack}.embed_positions.weight", arrays[f"{stack}/position_encodings/encodings"])
        norm(f"{stack}/layer_norm", f"{stack}.layer_norm")
        number = 0
        while f"{stack}/layer_{number}/ffn/linear_0/weight" in arrays:
            theirs, ours = f"{stack}/layer_{number}", f"{stack}.layers.{number}"
            attention(
                f"{theirs}/self_attention", f"{ours}.self_attn", f"{ours}.self_attn_layer_norm"
            )
            if stack == "decoder":
                attention(
                    f"{theirs}/attention", f"{ours}.encoder_attn", f"{ours}.encoder_attn_layer_norm"
                )
            norm(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
            linear(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
            linear(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
            number += 1
    return found


def _save_readers(files: Path, folder: Path, config: Any) -> None:
    """Write feature extractor and tokeniser, the latter's file as it is."""
    from transformers import WhisperFeatureExtractor

    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(folder)
    shutil.copyfile(files / "tokenizer.json", folder / "tokenizer.json")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_target_positions,
        "pad_token": "<|endoftext|>",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
