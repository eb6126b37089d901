"""Leave what the model writes for a few held-out prompts, before training and after it.

In:  evaluation rows of a model of language; the model at the start, and at the end.
Out: `generations.json` of the run folder: prompt, the text that stands there, and both answers.

Rows may be people's own words, so there are few (`run.sample-prompts`), and 0 leaves none. They are
spread evenly over the evaluation rows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from fedpet.data import Rows
    from fedpet.training.generation import Writer

__all__ = ["FILE", "read_generations", "samples_of"]

FILE = "generations.json"


def samples_of(
    model: Any, rows: Rows, writer: Writer, count: int, *, earlier: list[dict[str, str]], when: str
) -> list[dict[str, str]]:
    """Have a model write for the prompts of a run.

    Args:
        model: Of transformers.
        rows: The evaluation rows.
        writer: Of the run.
        count: Of prompts.
        earlier: What was written before, which stays beside it.
        when: "before" or "after".

    Returns:
        For each prompt: "prompt", "wanted", "before" and "after" where they are known.
    """
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(np.int64))
    entries = []
    for number, one in enumerate(writer.write(model, rows, chosen)):
        entry = {"prompt": one.prompt, "wanted": one.wanted}
        kept = earlier[number] if number < len(earlier) else {}
        if kept.get("prompt") == one.prompt:
            entry = {**kept, **entry}
        entries.append({**entry, when: one.text})
    return entries


def read_generations(folder: Path) -> list[dict[str, str]]:
    """Return what a run folder has of them; [] where it has none."""
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [
        {key: text for key, text in entry.items() if isinstance(text, str)}
        for entry in (found if isinstance(found, list) else [])
        if isinstance(entry, dict)
    ]
