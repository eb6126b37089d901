"""Save a tokeniser beside the plain model, and test that it reads texts as before.

In:  the checkpoint's folder, and the folder of the plain model.
Out: there, the tokeniser's files, which name the padding that the rows had.

It is saved by itself, not file by file: what a tokeniser is made of (added tokens, a sentencepiece
model, a chat template) is its own to know. What was saved is read again and compared.
"""

from __future__ import annotations

from pathlib import Path

from fedpet.data.padding import NO_CODE, config_of, padding_of
from fedpet.data.tokenize import load_tokenizer
from fedpet.errors import RunError

_PROBES = (
    "The quick brown fox jumps over 13 lazy dogs, doesn't it?",
    "  Two  spaces,\ttabs\nand lines; UPPER and lower case (brackets) #tags @names a_b-c/d 3.14%",
    "Crème brûlée, naïve façade, straße, Łódź, ЖЗИ, 日本語, عربى, 🙂",
)
_MAX_ADDED = 32


def save_tokenizer(checkpoint: Path, folder: Path) -> None:
    """Save a checkpoint's tokeniser, and see that it cuts texts as before.

    Args:
        checkpoint: Holds the tokeniser, and the configuration it goes with.
        folder: Where it goes; made where it is absent.

    Raises:
        DataError: The checkpoint's tokeniser cannot be loaded.
        RunError: The saved one cuts a text into other tokens, or cannot be saved or read.
        OSError: The folder cannot be written.
    """
    tokenizer = load_tokenizer(checkpoint)
    added = sorted(tokenizer.get_added_vocab())[:_MAX_ADDED]
    texts = [*_PROBES, *(f"a {token} b{token}c" for token in added)]
    expected = [tokenizer(text)["input_ids"] for text in texts]
    padding = padding_of(tokenizer, config_of(checkpoint), str(checkpoint))
    if tokenizer.pad_token_id != padding.token:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding.token)
    tokenizer.padding_side = side = "left" if padding.left else "right"
    # Saved are the settings that it was made with, as they are now: the side must be one of them.
    tokenizer.init_kwargs["padding_side"] = side
    for option in NO_CODE:
        tokenizer.init_kwargs.pop(option, None)
    try:
        tokenizer.save_pretrained(folder)
        saved = load_tokenizer(folder)
    except OSError:
        raise
    except Exception as error:  # tokenizers raises nothing narrower, a full disk included
        raise _unlike(checkpoint, folder, f"{type(error).__name__}: {error}") from None
    for text, ours in zip(texts, expected, strict=True):
        if (theirs := saved(text)["input_ids"]) != ours:
            raise _unlike(checkpoint, folder, f"{text!r} is {theirs} to it, and was {ours}")
    if (saved.pad_token_id, saved.padding_side) != (padding.token, side):
        found = f"token {saved.pad_token_id}, on the {saved.padding_side}"
        raise _unlike(checkpoint, folder, f"it pads with {found}")


def _unlike(checkpoint: Path, folder: Path, reason: str) -> RunError:
    return RunError(
        f"the tokeniser in {str(folder)!r} does not read texts as the one that trained: "
        f"{reason[:300]}. Serve the model with the tokeniser in {str(checkpoint)!r}, its padding "
        "on the side and with the token that the model's config.json asks for."
    )
