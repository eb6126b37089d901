"""Code blocks of a Markdown page, as the tests run them.

```python ... ```          a block; the blocks of a page share one namespace
<!-- setup ... -->         Python that runs with them, and that a reader does not see
<!-- simulation -->        alone on the line before a block: it starts Ray; others run in-process
<!-- slow -->              likewise: it takes minutes
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PARTS = re.compile(
    r"^(?:<!-- (?P<marker>simulation|slow) -->\n+)?```(?P<language>[\w-]*)\n(?P<code>.*?)^```$"
    r"|^<!-- setup\n(?P<setup>.*?)^-->$",
    re.DOTALL | re.MULTILINE,
)
_INLINE = re.compile(r"`([^`\n]+)`")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        language: "python", "sh", "toml", ...; "" where the page names none.
        code: Its lines.
        line: Of the page, where the code starts.
        marker: "simulation", "slow" or "".
    """

    language: str
    code: str
    line: int
    marker: str = ""


def blocks_of(page: Path) -> list[Block]:
    """List the blocks of a page in their order; hidden setups are Python blocks."""
    text = page.read_text(encoding="utf-8")
    blocks = []
    for found in _PARTS.finditer(text):
        group = "code" if found["setup"] is None else "setup"
        line = text.count("\n", 0, found.start(group)) + 1
        language = found["language"] if group == "code" else "python"
        blocks.append(Block(language, found[group], line, found["marker"] or ""))
    return blocks


def inline_code(page: Path) -> list[str]:
    """List what stands between single backticks, outside of blocks."""
    return _INLINE.findall(_PARTS.sub("", page.read_text(encoding="utf-8")))


def run_python(page: Path, blocks: list[Block]) -> dict[str, Any]:
    """Execute blocks in one namespace; a traceback names the page and its line.

    `[...]` stands for a list of the reader's own: it is empty here. Ten rounds or more are two.
    What a block without a marker simulates runs in this process.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks:
        shorter = re.sub(r"num_rounds=\d\d+", "num_rounds=2", block.code.replace("[...]", "[]"))
        if not block.marker:
            here = '__import__("functools").partial(fedpet.simulate, backend="in-process")('
            shorter = shorter.replace("fedpet.simulate(", here)
        code = "\n" * (block.line - 1) + shorter
        exec(compile(code, str(page), "exec", dont_inherit=True), namespace)
    return namespace
