"""Compare texts that a model writes with those that are wanted: ROUGE-L, chrF, BLEU, exact match.

Each is a fraction in [0, 1], the more the better, over all evaluation rows. `rouge_l` is the mean
over texts of the F-measure of the longest common subsequence of words, by rouge-score without
stemming, whose words are of the letters a to z and digits: for other scripts take chrF, of
characters. `chrf` and `bleu` are sacrebleu's, over the whole set; `exact_match` counts texts that
are equal, but for space around them.

References: Lin, ACL 2004 (ROUGE); Popović, WMT 2015 (chrF); Papineni et al., ACL 2002, and Post,
WMT 2018, arXiv:1804.08771 (BLEU).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedpet.tasks import Task, kind_of
from fedpet.utils.extras import check_extra

if TYPE_CHECKING:
    from fedpet.training.generation import Written

__all__ = ["check_text_metrics", "text_metrics", "written_metrics"]

_PACKAGES = {"rouge_l": "rouge_score", "chrf": "sacrebleu", "bleu": "sacrebleu"}


def written_metrics(task: Task) -> tuple[str, ...]:
    """Name the metrics of a task that are taken of texts which the model writes.

    Example:
        >>> written_metrics(Task("seq2seq", (), "chrf", ("rouge_l", "mine:metric")))
        ('chrf', 'rouge_l')
    """
    known = kind_of(task).written_metrics
    return tuple(name for name in dict.fromkeys((task.metric, *task.metrics)) if name in known)


def check_text_metrics(task: Task) -> None:
    """Refuse a metric whose library is not installed.

    Raises:
        ConfigError: It names the extra that brings it.
    """
    for name in written_metrics(task):
        if name in _PACKAGES:
            check_extra(_PACKAGES[name], "generation", f"the metric {name!r}")


def text_metrics(names: Sequence[str], written: Sequence[Written]) -> dict[str, float]:
    """Take metrics of texts.

    Args:
        names: Of `_METRICS`.
        written: At least one.
    """
    texts, wanted = [one.text for one in written], [one.wanted for one in written]
    return {name: _METRICS[name](texts, wanted) for name in names}


def _exact_match(texts: Sequence[str], wanted: Sequence[str]) -> float:
    return float(np.mean([one == other for one, other in zip(texts, wanted, strict=True)]))


def _rouge_l(texts: Sequence[str], wanted: Sequence[str]) -> float:
    module: Any = importlib.import_module("rouge_score.rouge_scorer")
    scorer = module.RougeScorer(["rougeL"], use_stemmer=False)
    pairs = zip(texts, wanted, strict=True)
    return float(np.mean([scorer.score(right, text)["rougeL"].fmeasure for text, right in pairs]))


def _chrf(texts: Sequence[str], wanted: Sequence[str]) -> float:
    library: Any = importlib.import_module("sacrebleu")
    return float(library.corpus_chrf(list(texts), [list(wanted)]).score) / 100


def _bleu(texts: Sequence[str], wanted: Sequence[str]) -> float:
    library: Any = importlib.import_module("sacrebleu")
    return float(library.corpus_bleu(list(texts), [list(wanted)]).score) / 100


_METRICS: dict[str, Callable[[Sequence[str], Sequence[str]], float]] = {
    "exact_match": _exact_match,
    "rouge_l": _rouge_l,
    "chrf": _chrf,
    "bleu": _bleu,
}
