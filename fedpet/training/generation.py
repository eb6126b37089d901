"""Have a model write: the last answer of a conversation, a target, or how a text goes on.

In:  rows of tokens with marks, or of speech; a model of language, the most new tokens.
Out: for each row the tokens that the model writes, and those that stand there.

Decoding is greedy: the same model writes the same. What comes before the last stretch of marked
tokens is the prompt, and the stretch is what is wanted; of a text whose tokens are all marked, the
first half or `TEXT_PROMPT` tokens are. A prompt is written on until a token that ends a turn.

Of speech the prompt is what the target begins with before its first word: Whisper's tokens of
language and task, which its own `generate` puts there as well.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from fedpet.backbone.device import device_of, to_device
from fedpet.data.tokenize import load_tokenizer
from fedpet.training.input_checks import max_tokens

if TYPE_CHECKING:
    from fedpet.data import Rows

__all__ = ["Writer", "Written", "split_prompt"]

TEXT_PROMPT = 32  # tokens
_ROWS = 16  # a batch
_OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "max_length", "min_length")


@dataclass(frozen=True)
class Written:
    """A prompt, what a model wrote behind it, and what stands there: texts."""

    prompt: str
    text: str
    wanted: str


@dataclass(frozen=True)
class Writer:
    """Write by a tokeniser.

    Attributes:
        folder: The tokeniser's.
        max_new_tokens: Of each text, at most.
    """

    folder: Path
    max_new_tokens: int

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.folder)

    @cached_property
    def _marking(self) -> list[int]:
        """Return the tokens that stand for no text: those of a start, a language, a task."""
        tokenizer = self._tokenizer
        added = {key for key, one in tokenizer.added_tokens_decoder.items() if one.special}
        return sorted(added.union(tokenizer.all_special_ids) - {tokenizer.unk_token_id})

    def write(self, model: Any, rows: Rows, indices: np.ndarray) -> list[Written]:
        """Have the model write for some rows, greedily.

        Args:
            model: Of transformers, put into evaluation mode.
            rows: With marks.
            indices: Of the rows, (n,).
        """
        model.eval()
        parts = [self._split(rows, int(index)) for index in indices]
        lengths = np.array([len(prompt) for prompt, _ in parts])
        texts = [""] * len(parts)
        for chosen in _cut(lengths, equal=rows.dense is not None):
            batch = self._batch(model, rows, indices[chosen], [parts[place] for place in chosen])
            for place, ids in zip(chosen, batch, strict=True):
                texts[place] = self._text(ids)
        return [
            Written(self._tokenizer.decode(prompt), text, self._text(wanted))
            for (prompt, wanted), text in zip(parts, texts, strict=True)
        ]

    def _split(self, rows: Rows, index: int) -> tuple[np.ndarray, np.ndarray]:
        prompt, wanted = split_prompt(rows, index)
        if rows.dense is None:
            return prompt, wanted
        words = ~np.isin(wanted[:-1], self._marking)
        first = int(words.argmax()) if words.any() else len(words)
        return wanted[:first], wanted[first:]

    @torch.inference_mode()
    def _batch(
        self,
        model: Any,
        rows: Rows,
        indices: np.ndarray,
        parts: Sequence[tuple[np.ndarray, np.ndarray]],
    ) -> list[list[int]]:
        """Write behind some prompts at once: they are padded on the left, an encoder's as ever."""
        prompts = [prompt for prompt, _ in parts]
        encodes, dense = rows.decoder_start >= 0, rows.dense
        longest = max(map(len, prompts))
        begun = 1 + longest if dense else 1 if encodes else longest  # before the first new token
        new, limit = self.max_new_tokens, max_tokens(model)
        if limit is not None:
            new = min(new, limit - begun)
        if new < 1:  # no position is left
            return [[] for _ in prompts]
        device = device_of(model)
        ids = np.full((len(prompts), longest), rows.pad_id, dtype=np.int64)
        inside = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            place = slice(0, len(prompt)) if encodes else slice(longest - len(prompt), None)
            ids[row, place], inside[row, place] = prompt, 1
        if dense is None:
            inputs = {
                "input_ids": torch.from_numpy(ids),
                "attention_mask": torch.from_numpy(inside),
            }
        else:
            ids = np.insert(ids, 0, rows.decoder_start, axis=1)
            inputs = {**dense.batch(indices), "decoder_input_ids": torch.from_numpy(ids)}
        settings = copy.deepcopy(model.generation_config)
        for name in _OF_SAMPLING:
            setattr(settings, name, None)
        stops = self._stops(settings.eos_token_id, [wanted for _, wanted in parts])
        settings.update(
            do_sample=False, num_beams=1, max_new_tokens=new, use_cache=True,
            pad_token_id=rows.pad_id, eos_token_id=sorted(stops) or None,
        )  # fmt: skip
        if encodes:
            settings.decoder_start_token_id = rows.decoder_start
        made = _generate(model, dense is not None)(
            **to_device(inputs, device), generation_config=settings
        )
        found = []
        for tokens in made[:, begun:].tolist():
            ends = [place for place, token in enumerate(tokens) if token in stops]
            found.append(tokens[: ends[0]] if ends else tokens)
        return found

    def _stops(self, stated: int | Sequence[int] | None, wanted: Sequence[np.ndarray]) -> set[int]:
        """Return the tokens that end a text: the model's, the tokeniser's, a template's."""
        stops = {stated} if isinstance(stated, int) else set(stated or ())
        if self._tokenizer.eos_token_id is not None:
            stops.add(self._tokenizer.eos_token_id)
        special = set(self._tokenizer.all_special_ids)
        return stops | {int(ids[-1]) for ids in wanted if len(ids) and int(ids[-1]) in special}

    def _text(self, ids: Sequence[int] | np.ndarray) -> str:
        text: str = self._tokenizer.decode(
            np.asarray(ids, dtype=np.int64), skip_special_tokens=True
        )
        return text.strip()


def _generate(model: Any, of_speech: bool) -> Callable[..., Tensor]:
    """Return a model's `generate`; not Whisper's own, which sets the language and task itself."""
    if not of_speech:
        return cast("Callable[..., Tensor]", model.generate)
    from transformers import GenerationMixin  # takes seconds

    return cast("Callable[..., Tensor]", functools.partial(GenerationMixin.generate, model))


def _cut(lengths: np.ndarray, *, equal: bool) -> list[np.ndarray]:
    """Cut rows into batches of like lengths, or of equal ones."""
    order = np.argsort(lengths, kind="stable")
    ends = np.flatnonzero(np.diff(lengths[order])) + 1 if equal else np.empty(0, dtype=np.int64)
    return [
        part[start : start + _ROWS]
        for part in np.split(order, ends)
        for start in range(0, len(part), _ROWS)
    ]


def split_prompt(rows: Rows, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Split a row into a prompt and what is wanted behind it: token ids, of any length but 0 first.

    Example:
        >>> import numpy as np
        >>> from fedpet.data import Rows
        >>> rows = Rows(tokens=np.array([5, 6, 7, 8, 9], np.int32), offsets=np.array([0, 5]),
        ...             labels=np.array([3]), types=None, pad_id=0,
        ...             marks=np.array([0, 1, 0, 1, 1], np.uint8))
        >>> split_prompt(rows, 0)
        (array([5, 6, 7], dtype=int32), array([8, 9], dtype=int32))
    """
    assert rows.marks is not None
    inside = slice(rows.offsets[index], rows.offsets[index + 1])
    tokens, marks = np.asarray(rows.tokens[inside]), np.asarray(rows.marks[inside])
    last = int(np.flatnonzero(marks)[-1])
    before = np.flatnonzero(marks[:last] == 0)
    first = int(before[-1]) + 1 if len(before) else 0
    if first <= 1 and rows.decoder_start < 0:  # a text, or a block of texts
        first = max(1, min(TEXT_PROMPT, len(tokens) // 2))
    return tokens[:first], tokens[first : last + 1]
