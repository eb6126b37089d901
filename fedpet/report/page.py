"""One page about a run, and about those it is compared with: opens offline, light and dark.

    ... -> strategy -> ledger -> [report]

In:  a `Report` (fedpet/report/loading.py).
Out: one HTML file that loads nothing, or the main plot as PNG.

The plots are drawn beforehand (`fedpet.report.plots`), so the page needs no script. A number that
a plot shows stands in a table as well.
"""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path

from fedpet.errors import InputError
from fedpet.report.loading import Report
from fedpet.report.plots import metric_png
from fedpet.report.sections import SECTIONS

__all__ = ["page", "write_page", "write_png"]


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
    """The page as HTML. The same report gives the same text."""
    run = report.result["run"]
    title = f"{run['experiment']}: {run['method']}, seed {run['seed']}"
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    body = "\n".join(part for section in SECTIONS for part in section(report))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _write(path: Path, write: Callable[[], object]) -> None:
    try:
        write()
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be written: {error.strerror or error}.") from None
