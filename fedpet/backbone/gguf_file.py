"""Convert a GGUF file into a checkpoint of safetensors, see fedpet/backbone/converted.py.

In:  a .gguf file of llama.cpp, and the type that its weights are to have.
Out: a folder as `save_pretrained` writes it: configuration, weights, tokeniser, chat template, and
     `gguf.json`, which says what the file was and in how many bits it held its weights.

transformers reads a GGUF file too, in every process anew: 16 s of a processor for 135 M weights,
where the converted file takes two. And it takes what it has read for a quantised model, which is
not saved, trained by `Trainer` or adapted by peft. Here weights are dequantised in float32, rounded
once to the type asked for, and stored as a plain model's: what fedpet masks, hashes and changes are
these stored weights.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from fedpet.backbone.converted import check_tensors, converted_once, hash_of
from fedpet.errors import BackboneError, InputError
from fedpet.utils.extras import check_extra

__all__ = ["GGUF_SUFFIX", "ORIGIN_FILE", "convert_gguf"]

GGUF_SUFFIX = ".gguf"
ORIGIN_FILE = "gguf.json"
# Raise it when the same file gives another folder than before.
_FORMAT = 1
_MAGIC = b"GGUF"


def convert_gguf(file: Path, source: str, *, dtype: str, sha256: str = "") -> Path:
    """Return the folder of a GGUF file's checkpoint; the first caller makes it, others wait.

    Args:
        file: Holds a model with its tokeniser.
        source: As the user named it, for messages.
        dtype: Of the weights, "float32" or "bfloat16".
        sha256: Of the file, in hex, where it is known; "" computes it.

    Raises:
        BackboneError: It is no GGUF file, of an architecture that transformers does not read from
            one, or lacks weights or a tokeniser; or the cache cannot be written.
        ConfigError: The package gguf is not installed.
    """
    sha256 = sha256 or _hash_file(file, source)

    def convert(building: Path) -> None:
        check_extra("gguf", "language", f"the backbone {source!r}, a GGUF file,")
        _convert(file, source, building, dtype, sha256)

    return converted_once(file.stem, dtype=dtype, sha256=sha256, version=_FORMAT, convert=convert)


def _hash_file(file: Path, source: str) -> str:
    found = hash_of(file)
    with file.open("rb") as opened:
        if opened.read(len(_MAGIC)) != _MAGIC:
            raise BackboneError(f"{source!r} is no GGUF file: it does not begin with 'GGUF'.")
    return found


def _convert(file: Path, source: str, folder: Path, dtype: str, sha256: str) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    torch_dtype = getattr(torch, dtype)
    try:
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        _shorten_floats(config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch_dtype)
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            read = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except (InputError, OSError):
        raise
    except Exception as error:  # gguf and transformers raise many kinds
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise BackboneError(
            f"the GGUF file of {source!r} could not be read as a language model ({reason})."
        ) from None
    tensors = check_tensors(read["tensors"], model, f"the GGUF file of {source!r}")
    stored = {name: tensor.to(torch_dtype).contiguous() for name, tensor in tensors.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config.architectures, config.dtype = [type(model).__name__], dtype
    config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    longest = getattr(config, "max_position_embeddings", None)
    if longest and tokenizer.model_max_length > longest:
        tokenizer.model_max_length = longest
        tokenizer.init_kwargs["model_max_length"] = longest
    tokenizer.save_pretrained(folder)
    (folder / ORIGIN_FILE).write_text(_origin(file, source, dtype, sha256), encoding="utf-8")


def _shorten_floats(config: Any) -> None:
    """Write 1e-05 in the place of 9.999999747378752e-06: GGUF holds numbers as float32."""
    for name, value in vars(config).items():
        if type(value) is float and math.isfinite(value) and float(np.float32(value)) == value:
            setattr(config, name, float(str(np.float32(value))))


def _origin(file: Path, source: str, dtype: str, sha256: str) -> str:
    """Say what a checkpoint was made of, as JSON."""
    from gguf import GGUFReader

    reader = GGUFReader(os.fspath(file))
    entries: Counter[str] = Counter()
    for tensor in reader.tensors:
        entries[tensor.tensor_type.name] += int(tensor.n_elements)
    fields = {
        name: field.contents()
        for name, field in reader.fields.items()
        if name in ("general.name", "general.license", "general.basename")
    }
    content = {
        "source": source,
        "file": file.name,
        "sha256": sha256,
        "entries_by_type": dict(entries),
        "dtype": dtype,
        "converted_by": {
            name: importlib.metadata.version(name) for name in ("gguf", "transformers")
        },
        **fields,
    }
    return json.dumps(content, indent=2) + "\n"
