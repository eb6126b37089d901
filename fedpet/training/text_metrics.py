"""Compare texts that a model writes with those that are wanted: ROUGE-L, chrF, BLEU, error rates.

All but the error rates are fractions in [0, 1], the more the better, over all evaluation rows.
`rouge_l` is the mean
over texts of the F-measure of the longest common subsequence of words, by rouge-score without
stemming, whose words are of the letters a to z and digits: for other scripts take chrF, of
characters. `chrf` and `bleu` are sacrebleu's, over the whole set; `exact_match` counts texts that
are equal, but for space around them.

`wer` and `cer` are jiwer's rates of errors in words and in characters, the less the better: words
or characters to put in, take out or replace, of all rows together, by those that are wanted in all;
never a mean of rows' rates. What is written where nothing is wanted is put in too many, so a rate
may be above 1; where no row has a word that is wanted, the rate is the number of those written.
Blanks separate words. Case and punctuation count: a reference without them asks for a model that
writes none.

References: Lin, ACL 2004 (ROUGE); Popović, WMT 2015 (chrF); Papineni et al., ACL 2002, and Post,
WMT 2018, arXiv:1804.08771 (BLEU); Morris, Maier and Green, Interspeech 2004 (word error rate).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedpet.errors import ConfigError
from fedpet.tasks import TASKS, Task, kind_of
from fedpet.training.metrics import METRICS
from fedpet.utils.extras import check_extra

if TYPE_CHECKING:
    from fedpet.training.generation import Written

__all__ = ["check_text_metrics", "text_metrics", "written_metrics"]

_PACKAGES = {
    "rouge_l": "rouge_score",
    "chrf": "sacrebleu",
    "bleu": "sacrebleu",
    "wer": "jiwer",
    "cer": "jiwer",
}


def written_metrics(task: Task) -> tuple[str, ...]:
    """Name the metrics of a task that are taken of texts which the model writes.

    Example:
        >>> written_metrics(Task("seq2seq", (), "chrf", ("rouge_l", "mine:metric")))
        ('chrf', 'rouge_l')
    """
    known = kind_of(task).written_metrics
    return tuple(name for name in dict.fromkeys((task.metric, *task.metrics)) if name in known)


def check_text_metrics(task: Task) -> None:
    """Refuse a metric that the task cannot have, or whose library is not installed.

    Raises:
        ConfigError: It names the tasks whose texts it is taken of, or the extra that brings it.
    """
    for name in task.metrics:
        tasks = [other for other in TASKS.names if name in kind_of(other).written_metrics]
        if tasks and not _is_known(name, task):
            raise ConfigError(
                f"data.metrics names {name!r}, which is taken of texts that a model writes, and "
                f"data.task = {task.kind!r} has no such metric: leave it out, or take a task of "
                f"{', '.join(tasks)}."
            )
    for name in written_metrics(task):
        if name in _PACKAGES:
            check_extra(_PACKAGES[name], "generation", f"the metric {name!r}")


def _is_known(name: str, task: Task) -> bool:
    """Tell a metric of the task, or a user's own of that name."""
    kind = kind_of(task)
    return name in (*kind.metrics, *kind.written_metrics, *METRICS.names)


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


def _wer(texts: Sequence[str], wanted: Sequence[str]) -> float:
    library: Any = importlib.import_module("jiwer")
    return float(library.process_words(list(wanted), list(texts)).wer)


def _cer(texts: Sequence[str], wanted: Sequence[str]) -> float:
    library: Any = importlib.import_module("jiwer")
    return float(library.process_characters(list(wanted), list(texts)).cer)


_METRICS: dict[str, Callable[[Sequence[str], Sequence[str]], float]] = {
    "exact_match": _exact_match,
    "rouge_l": _rouge_l,
    "chrf": _chrf,
    "bleu": _bleu,
    "wer": _wer,
    "cer": _cer,
}
