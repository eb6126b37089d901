"""Write one page about a run and those it is compared with; it opens offline, light and dark.

In:  a `Report` (fedpet/report/loading.py).
Out: one HTML file that loads nothing, or the main plot as PNG.

The plots are drawn beforehand (fedpet/report/plots.py), so the page needs no script. A number that
a plot shows stands in a table as well.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fedpet.errors import InputError
from fedpet.report.loading import Report
from fedpet.report.page_parts import Heat, page_parts
from fedpet.report.plots import metric_png

__all__ = ["heat_html", "page", "write_page", "write_png"]

TEMPLATES = Path(__file__).with_name("templates")


def write_page(report: Report, path: Path) -> None:
    """Write the page to a file.

    Raises:
        InputError: The file cannot be written.
    """
    _write(path, lambda: path.write_text(page(report), encoding="utf-8"))


def write_png(report: Report, path: Path) -> None:
    """Write the main plot to a file.

    Raises:
        InputError: The file cannot be written.
    """
    metric = report.result["quality"]["metric"]
    _write(path, lambda: metric_png(report.lines, metric, path))


def page(report: Report) -> str:
    """Return the page as HTML. The same report gives the same text."""
    style = Markup((TEMPLATES / "page.css").read_text(encoding="utf-8"))
    return _environment().get_template("page.html.jinja").render(style=style, **page_parts(report))


def heat_html(heat: Heat) -> str:
    """Return a heat map as an HTML table."""
    pieces: Any = _environment().get_template("pieces.html.jinja").module
    return str(pieces.heat(heat))


@cache
def _environment() -> Environment:
    """Make the templates' environment: text is escaped, and a name that is not given fails."""
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _write(path: Path, write: Callable[[], object]) -> None:
    try:
        write()
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be written: {error.strerror or error}.") from None
