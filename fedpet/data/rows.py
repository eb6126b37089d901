"""Rows: tokenised text, laid end to end in one array, and cut into padded batches.

In:  token ids of all rows, where each row starts, labels; or images or speech, see
     fedpet/data/dense_inputs.py.
Out: `Rows.batch(indices)`: what a transformers model takes, padded to this batch's longest row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedpet.data.collator import Collator, collate
from fedpet.data.dense_inputs import DenseInputs

NO_LABEL = -100  # of a token that is no label, as transformers and torch have it


@dataclass(frozen=True, eq=False)
class Rows:
    """Tokenised rows; the arrays may be memory-mapped and are never written.

    Law: `batch` gives back exactly the tokens of the rows asked for, in the order asked for.
    """

    tokens: np.ndarray  # int32 (num_tokens,), all rows end to end
    offsets: np.ndarray  # int64 (n + 1,), row i is tokens[offsets[i] : offsets[i + 1]]
    # int64 (n,) class indices or numbers of labelled tokens, float32 (n,) values, or float32
    # (n, classes) with 1 for each class of a row.
    labels: np.ndarray
    types: np.ndarray | None  # uint8 (num_tokens,), where the tokeniser makes token type ids
    pad_id: int  # what fills a row up; masked out by attention_mask
    pad_left: bool = False  # on which side
    clients: np.ndarray | None = None  # int32 (n,), a number for each client, where rows tell
    collator: Collator | None = None  # a user's own, makes batches in place of `batch`'s padding
    # uint8 (num_tokens,): 1 of a token that is a label, which a model predicts from those before
    # it. None where a row has one label. A row's first token is none.
    marks: np.ndarray | None = None
    # At least 0: marked tokens stand behind the others and are what a decoder writes, which reads
    # them shifted right behind this token.
    decoder_start: int = -1
    # int16 (num_tokens,): 1 + the class of a token that has one, else 0.
    tags: np.ndarray | None = None
    # int32 (classes, longest): the tokens that a decoder writes for each class, -100 behind them.
    choices: np.ndarray | None = None
    dense: DenseInputs | None = None  # beside or instead of tokens

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens a row, those of an image or of speech included: int32, shape (n,)."""
        of_dense = 0 if self.dense is None else self.dense.num_tokens
        return (np.diff(self.offsets) + of_dense).astype(np.int32)

    @property
    def has_token_labels(self) -> bool:
        """Tell whether tokens have the labels, and `labels` counts them by row."""
        return self.tags is not None or (self.marks is not None and self.choices is None)

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        """Gather rows, padded to the longest of them, or as the collator makes a batch.

        Args:
            indices: Row numbers, at least one: int64, shape (b,).

        Returns:
            `input_ids` and `attention_mask`, int64 (b, longest); `token_type_ids`, the same,
            where the tokeniser makes them; `labels`, int64 or float32 (b,); where tokens are
            labels, those, int64 (b, longest), with -100 for all others, as transformers has them;
            where tokens have classes, these. With `choices`, int64 (b, 1 + classes, longest): the
            tokens of the row's own class, then those of each. In the place of the first two,
            `pixel_values` or `input_features` where rows are images or speech.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if self.collator is not None:
            return collate(self.collator, [self.features(index) for index in indices])
        starts = self.offsets[indices]  # (b,)
        lengths = self.offsets[indices + 1] - starts  # (b,)
        if self.decoder_start >= 0:
            return self._pairs(indices, starts, lengths)
        if self.dense is not None:
            own = torch.from_numpy(np.asarray(self.labels[indices]))
            return {**self.dense.batch(indices), "labels": own}
        inside, places = _places(starts, lengths, left=self.pad_left)  # (b, longest)
        batch = {
            "input_ids": np.where(inside, self.tokens[places], self.pad_id),
            "attention_mask": inside,
        }
        if self.types is not None:
            batch["token_type_ids"] = np.where(inside, self.types[places], 0)
        tensors = {name: torch.from_numpy(a.astype(np.int64)) for name, a in batch.items()}
        labels = self.labels[indices]
        if self.marks is not None:
            marked = inside & (self.marks[places] > 0)
            labels = np.where(marked, self.tokens[places], NO_LABEL).astype(np.int64)
        if self.tags is not None:
            tags = np.where(inside, self.tags[places], 0).astype(np.int64)
            labels = np.where(tags > 0, tags - 1, NO_LABEL)
        tensors["labels"] = torch.from_numpy(labels)
        return tensors

    def _pairs(
        self, indices: np.ndarray, starts: np.ndarray, lengths: np.ndarray
    ) -> dict[str, Tensor]:
        """Gather sources for an encoder and targets for a decoder; three arrays of (b,)."""
        labels = self.labels[indices]
        if self.choices is not None:
            own, targets = self.choices[labels], np.zeros_like(lengths)
            labels = np.concatenate([own[:, None], np.broadcast_to(
                self.choices, (len(own), *self.choices.shape))], axis=1)  # fmt: skip
        else:
            targets = labels
            of_target, target = _places(starts + lengths - targets, targets, left=False)
            labels = own = np.where(of_target, self.tokens[target], NO_LABEL)
        batch = {}
        if self.dense is None:
            inside, places = _places(starts, lengths - targets, left=self.pad_left)
            batch["input_ids"] = np.where(inside, self.tokens[places], self.pad_id)
            batch["attention_mask"] = inside
        batch |= {"decoder_input_ids": self._shifted(own), "labels": labels}
        tensors = {name: torch.from_numpy(a.astype(np.int64)) for name, a in batch.items()}
        return tensors if self.dense is None else {**self.dense.batch(indices), **tensors}

    def _shifted(self, targets: np.ndarray) -> np.ndarray:
        """Return what a decoder reads to write these tokens, (b, longest)."""
        shifted = np.full_like(targets, self.decoder_start)
        shifted[:, 1:] = np.where(targets == NO_LABEL, self.pad_id, targets)[:, :-1]
        return shifted

    def features(self, index: int) -> dict[str, Any]:
        """Return a row as collators take it: lists by name."""
        inside = slice(self.offsets[index], self.offsets[index + 1])
        ids, label = self.tokens[inside].tolist(), self.labels[index].tolist()
        if self.dense is not None:
            [(name, values)] = self.dense.batch(np.asarray([index])).items()
            return {name: values[0], "labels": label if self.marks is None else ids}
        types = {} if self.types is None else {"token_type_ids": self.types[inside].tolist()}
        if self.choices is not None:
            own = self.choices[label]
            label = own[own != NO_LABEL].tolist()
            return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": label}
        if self.decoder_start >= 0:
            cut = len(ids) - label
            return {"input_ids": ids[:cut], "attention_mask": [1] * cut, "labels": ids[cut:]}
        if self.marks is not None:
            label = np.where(self.marks[inside] > 0, self.tokens[inside], NO_LABEL).tolist()
        if self.tags is not None:
            tags = self.tags[inside].astype(np.int64)
            label = np.where(tags > 0, tags - 1, NO_LABEL).tolist()
        return {"input_ids": ids, "attention_mask": [1] * len(ids), **types, "labels": label}

    def take(self, indices: np.ndarray) -> Rows:
        """Copy some rows, in the order of their numbers here."""
        starts, stops = self.offsets[indices], self.offsets[indices + 1]
        places = np.concatenate([np.arange(a, b) for a, b in zip(starts, stops, strict=True)])
        return replace(
            self,
            tokens=self.tokens[places],
            offsets=np.concatenate([[0], np.cumsum(stops - starts)]).astype(np.int64),
            labels=np.asarray(self.labels)[indices],
            types=None if self.types is None else self.types[places],
            marks=None if self.marks is None else self.marks[places],
            tags=None if self.tags is None else self.tags[places],
            dense=None if self.dense is None else self.dense.take(indices),
            clients=None if self.clients is None else self.clients[indices],
        )


def _places(
    starts: np.ndarray, lengths: np.ndarray, *, left: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return where a padded batch has tokens, and which: bool and int64, (b, longest)."""
    columns = np.arange(lengths.max())[None]  # (1, longest)
    if left:
        columns = columns - (lengths.max() - lengths)[:, None]  # (b, longest), < 0 in padding
    inside = (columns >= 0) & (columns < lengths[:, None])
    # Outside a row, read its first token: it is in bounds, and replaced.
    return inside, starts[:, None] + np.where(inside, columns, 0)


def no_rows(like: Rows) -> Rows:
    """Rows of the same kind, none of them."""
    return replace(
        like,
        tokens=like.tokens[:0],
        offsets=np.zeros(1, dtype=np.int64),
        labels=like.labels[:0],
        types=None if like.types is None else like.types[:0],
        marks=None if like.marks is None else like.marks[:0],
        tags=None if like.tags is None else like.tags[:0],
        dense=None if like.dense is None else like.dense.take(np.empty(0, dtype=np.int64)),
        clients=None if like.clients is None else like.clients[:0],
    )
