"""Render a jinja2 template: a file of the package that tools can lint, with values filled in.

A name that a template asks for and is not given is an error. `quote` makes a value one word of a
shell.
"""

from __future__ import annotations

import functools
from pathlib import Path
from shlex import quote
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

__all__ = ["render"]


def render(template: Path, **values: Any) -> bytes:
    """Fill in a template, which may include others of its folder."""
    return _environment(template.parent).get_template(template.name).render(values).encode()


@functools.cache
def _environment(folder: Path) -> Environment:
    made = Environment(
        loader=FileSystemLoader(folder),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["quote"] = quote
    return made
