"""Choose the token that fills rows up to equal length, and the side.

In:  a tokeniser, and the configuration of the model that it belongs to.
Out: a `Padding`, the same on every machine that holds the same checkpoint.

Attention is masked on padding, so an encoder gives the same logits whatever the token is. A
classifier that reads the last token of a text (GPT-2, Llama, Mistral, Qwen2) finds it as the last
that is not `pad_token_id` of its configuration: there both must name one token, or logits depend
on the batch. `fedpet/training/input_checks.py` sees to that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpet.errors import DataError

NO_CODE = {"local_files_only": True, "trust_remote_code": False}  # else transformers asks on stdin


@dataclass(frozen=True)
class Padding:
    """Token and side that fill a row up."""

    token: int  # its id
    left: bool = False


def padding_of(tokenizer: Any, config: Any, where: str) -> Padding:
    """Settle the padding of a checkpoint.

    The token is the first that can stand for padding, of: the tokeniser's padding token, the
    configuration's, the tokeniser's end token, the configuration's, any special token of the
    tokeniser. So one that both name is kept; where one of them names none, the other's is taken;
    where they differ, the tokeniser's, and `fedpet/training/input_checks.py` moves the model to it
    if the model's
    logits ask for that; where neither names one, the end token.

    A token can stand for padding if the model has a row for it, and if no text becomes it: GPT-2's
    token 0 is "!", and as padding it would be cut out of "!!".

    Rows are filled up on the right, whatever side the tokeniser names, since absolute positions
    count from the left. The exception is a classifier that reads the last column (XLNet).

    Args:
        tokenizer: Of transformers.
        config: Of the model, see `config_of`; None where there is none.
        where: The tokeniser's place, for the message.

    Raises:
        DataError: No token can stand for padding.
    """
    vocabulary = getattr(config, "vocab_size", None)
    for token_id in _candidates(tokenizer, config):
        if vocabulary is not None and token_id >= vocabulary:
            continue
        if token_id == tokenizer.pad_token_id or _is_apart(tokenizer, token_id):
            return Padding(token_id, getattr(config, "summary_type", None) == "last")
    raise DataError(
        f"the tokeniser in {where!r} names no padding token, no end token and no other special "
        'token that the model has a row for: name one as "pad_token" in tokenizer_config.json.'
    )


def config_of(folder: Path) -> Any:
    """Read the configuration of the text model in a folder; None where transformers reads none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, **NO_CODE).get_text_config()
    except Exception:  # as `load_backbone` will say, in words of its own
        return None


def _candidates(tokenizer: Any, config: Any) -> Iterator[int]:
    for found in (
        tokenizer.pad_token_id,
        getattr(config, "pad_token_id", None),
        tokenizer.eos_token_id,
        getattr(config, "eos_token_id", None),
        tokenizer.all_special_ids,
    ):
        for token_id in found if isinstance(found, list) else [found]:
            if token_id is not None and token_id >= 0:  # some name none by -1
                yield int(token_id)


def _is_apart(tokenizer: Any, token_id: int) -> bool:
    """Test that no text becomes this token, but one that spells a special token out."""
    word = tokenizer.convert_ids_to_tokens(token_id)
    if word is None:
        return False
    if token_id in tokenizer.all_special_ids or token_id in tokenizer.added_tokens_decoder:
        return True
    return bool(tokenizer.encode(word, add_special_tokens=False) != [token_id])
