"""Render the files of a deployment from the templates beside this module.

A template is named as the file that comes out, with `.j2` behind; a name that it asks for and is
not given is an error. `quote` makes a value one word of a shell.
"""

from __future__ import annotations

import functools
from pathlib import Path
from shlex import quote
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

__all__ = ["render"]


def render(template: str, **values: Any) -> bytes:
    """Fill in a template: `render("run.sh", address="127.0.0.1:8000")`."""
    return _environment().get_template(f"{template}.j2").render(values).encode()


@functools.cache
def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["quote"] = quote
    return made
