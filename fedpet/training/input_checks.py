"""Check that a backbone can take the rows: their padding and their length.

In:  a model as loaded, and the rows it is to be called with.
Out: the model, its configuration naming the rows' padding where the model goes by it; or a refusal.

Law: a row's logits do not depend on the rows it shares a batch with.

Whether a model goes by `pad_token_id` is not looked up but tried, where the checkpoint's tokeniser
and configuration differ: RoBERTa counts positions from it, so that it must stay, and Llama's
classifier looks for it in the rows, so that it must be theirs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fedpet.backbone.device import device_of
from fedpet.errors import BackboneError, ConfigError
from fedpet.training.batching import inputs_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fedpet.data import Rows

__all__ = ["check_inputs", "max_tokens", "settle_padding"]

# Of logits that should be alike: float32 and another shape of the batch part them by some 1e-6.
_RELATIVE, _ABSOLUTE, _EXACT = 1e-3, 1e-5, 1e-5
# In bfloat16 thirty blocks part them by 0.025 of the largest, measured on a row of three tokens.
_COARSE = 0.06


def settle_padding(model: PreTrainedModel, rows: Rows) -> None:
    """Have the configuration name the rows' padding, where it names none or another.

    Where it names another, it is left alone if the logits do not depend on that.

    Args:
        model: Of the rows' checkpoint, before modules act on it. Its configuration may be changed,
            and is saved with it.
        rows: At least one.

    Raises:
        BackboneError: The model cannot be called with a row.
    """
    config: Any = model.config.get_text_config()
    stated = getattr(config, "pad_token_id", None)
    if stated == rows.pad_id:
        return
    if stated is None or stated < 0 or not _pads_freely(model, rows):
        config.pad_token_id = rows.pad_id


def check_inputs(model: PreTrainedModel, rows: Rows, max_length: int) -> None:
    """Settle the padding, and refuse a model that cannot take such rows.

    Args:
        model: As in `settle_padding`.
        rows: At least one.
        max_length: Tokens a row, special ones counted.

    Raises:
        BackboneError: The model cannot be called with a row, its logits are NaN, or a row's depend
            on its batch.
        ConfigError: `max_length` is more than the model has positions.
    """
    limit = max_tokens(model)
    if limit is not None and max_length > limit:
        raise ConfigError(
            f"data.max-length is {max_length} tokens, and this backbone has positions for at most "
            f"{limit}: lower it."
        )
    if rows.dense is not None:
        _check_call(model, rows)
        return
    settle_padding(model, rows)
    if rows.marks is not None and rows.decoder_start < 0 and not _looks_back_alone(model, rows):
        raise BackboneError(
            f"the logits of {type(model).__name__} for a token depend on the tokens after it, and "
            "a language model predicts a token from those before: take a causal backbone (GPT-2, "
            "Llama)."
        )
    if not _pads_freely(model, rows):
        raise BackboneError(
            f"the logits of {type(model).__name__} for a text depend on the texts beside it: they "
            f"change with padding (token {rows.pad_id}, on the {_side(rows)}). Take a backbone "
            "that masks its padding."
        )
    _refuse_no_numbers(model, rows)


def max_tokens(model: nn.Module) -> int | None:
    """Return the most tokens that a model has learned positions for; None where it computes them.

    Rotary and relative positions (Llama, T5, DeBERTa) go on beyond `max_position_embeddings`, and
    data.max-length may: what the model makes of such a text is the user's to judge.
    """
    limits = [
        _num_positions(table)
        for name, table in model.named_modules()
        if isinstance(table, nn.Embedding) and _is_of_positions(name.rpartition(".")[2])
    ]
    return min(limits, default=None)


def _is_of_positions(name: str) -> bool:
    """Tell by the last part of a module's name: BERT's, BART's, GPT-2's, GPT's."""
    return name in ("position_embeddings", "embed_positions", "wpe", "positions_embed")


def _num_positions(table: nn.Embedding) -> int:
    """Count a table's rows from that of the first token: without BART's two, or RoBERTa's."""
    if isinstance(offset := getattr(table, "offset", None), int):
        return table.num_embeddings - offset
    return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)


@torch.no_grad()
def _pads_freely(model: nn.Module, rows: Rows) -> bool:
    """Tell whether the shortest row has the same logits alone and with a column of padding."""
    shortest = np.asarray([np.argmin(rows.lengths)])
    batch, _ = inputs_of(rows, shortest, device_of(model))
    if batch["input_ids"].shape[1] > 2:  # make room: it may be as long as the model takes
        batch = {
            name: x if name.startswith("decoder_") else torch.cat([x[:, :1], x[:, 2:]], 1)
            for name, x in batch.items()
        }
    fill = {"input_ids": rows.pad_id}
    padded = {
        name: x if name.startswith("decoder_") else _filled(x, fill.get(name, 0), rows.pad_left)
        for name, x in batch.items()
    }
    try:
        alone, beside = (model(**inputs).logits for inputs in (batch, padded))
    except Exception as error:  # whatever a model raises at its first text
        raise _not_callable(model, error, "a text") from None
    if alone.shape != beside.shape:  # logits of each token
        beside = beside[:, 1:] if rows.pad_left else beside[:, :-1]
    relative = _RELATIVE if alone.dtype == torch.float32 else _COARSE
    atol = _ABSOLUTE + relative * _largest(alone)
    return torch.allclose(alone, beside, rtol=0, atol=atol, equal_nan=True)


@torch.no_grad()
def _check_call(model: nn.Module, rows: Rows) -> None:
    """Refuse a model that cannot be called with a row that is no text."""
    batch, _ = inputs_of(rows, np.arange(1), device_of(model))
    try:
        model(**batch)
    except Exception as error:  # whatever a model raises at its first image
        raise _not_callable(model, error, "a row") from None


def _not_callable(model: nn.Module, error: Exception, what: str) -> BackboneError:
    reason = " ".join(str(error).split())
    return BackboneError(
        f"{type(model).__name__} cannot be called with {what} of the data "
        f"({type(error).__name__}: {reason[:200]}): mend the checkpoint's config.json or take "
        "another backbone."
    )


@torch.no_grad()
def _refuse_no_numbers(model: nn.Module, rows: Rows) -> None:
    """Refuse a model whose logits for a row are NaN: every client's loss would be."""
    shortest = np.asarray([np.argmin(rows.lengths)])
    inputs, _ = inputs_of(rows, shortest, device_of(model))
    logits = model(**inputs).logits
    if not logits.isnan().any():
        return
    broken = next((name for name, p in model.named_parameters() if not p.isfinite().all()), "")
    advice = f"{broken} of the checkpoint is not finite: mend it, or take another one."
    if not broken:
        half = logits.dtype != torch.float32
        advice = "take backbone.dtype = 'float32'." if half else "take another checkpoint."
    raise BackboneError(
        f"the logits of {type(model).__name__} for a text of the data are NaN before any training, "
        f"in {str(logits.dtype).removeprefix('torch.')}: {advice}"
    )


@torch.no_grad()
def _looks_back_alone(model: nn.Module, rows: Rows) -> bool:
    """Tell whether a row's logits stay but for the last, if its last token is another."""
    longest = np.asarray([np.argmax(rows.lengths)])
    batch, _ = inputs_of(rows, longest, device_of(model))
    other = dict(batch)
    other["input_ids"] = batch["input_ids"].clone()
    other["input_ids"][:, -1] = batch["input_ids"][:, 0]
    ours, theirs = (model(**inputs).logits[:, :-1] for inputs in (batch, other))
    atol = _EXACT * _largest(ours)  # of one shape, so all but bit for bit
    return torch.allclose(ours, theirs, rtol=0, atol=atol, equal_nan=True)


def _largest(logits: Tensor) -> float:
    """Return the largest magnitude of those that are numbers."""
    return float(logits.abs().nan_to_num(0.0, 0.0).max())


def _filled(tensor: Tensor, value: int, left: bool) -> Tensor:
    """Add a column before, or after. `tensor`: (1, tokens)."""
    return nn.functional.pad(tensor, (1, 0) if left else (0, 1), value=value)


def _side(rows: Rows) -> str:
    return "left" if rows.pad_left else "right"
