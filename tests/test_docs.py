"""The README and the pages of the site: their code runs, their keys and commands exist."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import typer
from doc_blocks import Block, blocks_of, inline_code, run_python
from own_names import built_in_names

import fedpet
from benchmarks import __main__ as benchmarks_main
from fedpet.cli.main import app
from fedpet.config import Experiment

REPOSITORY = Path(__file__).resolve().parents[1]

PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    *sorted((REPOSITORY / "docs").rglob("*.md")),
]
STAGES = Experiment().to_tables()


def _name(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


def _python_pages() -> Iterator[Any]:
    """A page with the blocks that run without a marker; and once more with those of each marker.

    The README's stand in tests/run/test_readme_example.py.
    """
    for page in PAGES[1:]:
        blocks = [block for block in blocks_of(page) if block.language == "python"]
        allowed = {""}
        for marker in ("", "simulation", "slow"):
            allowed.add(marker)
            if any(block.marker == marker for block in blocks):
                yield pytest.param(
                    page,
                    [block for block in blocks if block.marker in allowed],
                    marks=[getattr(pytest.mark, marker), pytest.mark.timeout(600)]
                    if marker
                    else [],
                    id=" ".join(filter(None, [_name(page), marker])),
                )


@pytest.mark.parametrize(("page", "blocks"), [*_python_pages()])
def test_every_python_block_of_a_page_runs(
    page: Path, blocks: list[Block], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with built_in_names():  # a page may register some of its own
        run_python(page, blocks)


# Experiments and settings


def _blocks(*languages: str) -> list[Any]:
    return [
        pytest.param(block, id=f"{_name(page)}:{block.line}")
        for page in PAGES
        for block in blocks_of(page)
        if block.language in languages
    ]


@pytest.mark.parametrize("block", _blocks("toml"))
def test_every_experiment_that_is_shown_can_be_read(block: Block) -> None:
    tables = tomllib.loads(block.code)
    if any(isinstance(value, dict) for value in tables.values()):  # else a node's own file
        Experiment.from_tables(tables)


@pytest.mark.parametrize("block", _blocks("json", "jsonl"))
def test_every_line_of_data_that_is_shown_is_json(block: Block) -> None:
    for line in block.code.splitlines():
        json.loads(line)


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_setting_that_a_page_names_exists(page: Path) -> None:
    for code in inline_code(page):
        key = re.match(r"(\w+)\.([a-z][a-z0-9-]*)(?: = (.+))?$", code)
        if key is None or key[1] not in STAGES or key[2] in ("json", "toml", "bin", "sh"):
            continue
        if key[1] == "run" and key[2] in ("status", "resumed", "metrics", "ledger", "model"):
            continue  # fields of result.json, and of a run in Python
        if key[1] == "data" and key[2] in ("classes", "rows"):
            continue
        assert key[2] in STAGES[key[1]], f"{_name(page)} names {code}"


def test_every_setting_is_on_the_page_of_settings() -> None:
    text = (REPOSITORY / "docs" / "settings.md").read_text(encoding="utf-8")
    for stage, keys in STAGES.items():
        table = text.partition(f"## [{stage}]\n")[2].partition("\n## [")[0]
        missing = [key for key in keys if f"| `{key}` |" not in table]
        assert not missing, f"[{stage}] lacks {missing}: run scripts/readme"


# Commands


def _commands(code: str) -> Iterator[list[str]]:
    """Each command of a shell block, as words, comments and assignments left out."""
    for line in code.replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|\|\||;", line):
            words = shlex.split(part, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                words = words[1:]
            if words:
                yield words


def _check_fedpet(words: list[str]) -> None:
    """Check a call of the command line: the command, its options, the keys that it sets."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    if len(words) < 2 or not words[1].islower() or words[1].startswith("-"):
        return
    assert words[1] in commands, words
    known = {option for one in commands[words[1]].params for option in one.opts} | {"--help"}
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    assert set(options) <= known, (words, set(options) - known)
    _check_overrides(value for name, value in pairwise(words) if name == "--set")


def _check_overrides(overrides: Iterable[str]) -> None:
    shipped = REPOSITORY / "simulations" / "experiments" / "film-reviews.toml"
    Experiment.from_file(shipped, overrides)


def _check_command(words: list[str]) -> None:
    program = words[0].rpartition("/")[2]
    if program == "fedpet":
        _check_fedpet(words)
    elif program == "make":
        makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
        for target in words[1:]:
            if re.fullmatch(r"[a-z-]+", target):
                assert re.search(rf"^{target}:", makefile, re.MULTILINE), words
    elif words[1:3] == ["-m", "benchmarks"]:
        assert words[3] in typer.main.get_command(benchmarks_main.app).commands, words  # type: ignore[attr-defined]
        assert (REPOSITORY / words[4]).is_file(), words
    elif words[1:2] == ["-m"] and words[2].startswith("benchmarks"):
        path = REPOSITORY / words[2].replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").is_file(), words
    elif words[:2] == ["flwr", "run"] and "--run-config" in words:
        config = words[words.index("--run-config") + 1]
        given = tomllib.loads("\n".join(shlex.split(config, posix=False)))
        assert given.keys() <= Experiment().to_run_config().keys(), words


@pytest.mark.parametrize("block", _blocks("sh"))
def test_every_command_that_is_shown_exists_with_its_options(block: Block) -> None:
    parsed = subprocess.run(
        ["bash", "-n"], input=block.code, capture_output=True, text=True, check=False
    )
    assert parsed.returncode == 0, parsed.stderr
    for words in _commands(block.code):
        _check_command(words)


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_command_in_a_sentence_exists(page: Path) -> None:
    for code in inline_code(page):
        if re.match(r"(fedpet|make|python -m benchmarks) ?", code) and " " in code:
            _check_command(shlex.split(re.sub(r"[\[\]]|\.\.\.", "", code)))


def test_every_command_has_its_line_on_the_page_of_commands() -> None:
    text = (REPOSITORY / "docs" / "command-line.md").read_text(encoding="utf-8")
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    missing = [name for name in commands if f"| `fedpet {name} " not in text]
    assert not missing


# The site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a warning of mkdocs fails it."""
    pytest.importorskip("mkdocstrings")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [REPOSITORY / "scripts" / "site", folder],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class _Links(HTMLParser):
    """Read what a page links to, what it loads, and the anchors that it has."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag in ("img", "script") and "src" in given:
            self.loads.append(given["src"])
        elif tag == "link" and "href" in given:
            self.loads.append(given["href"])


def test_every_link_inside_the_site_leads_somewhere(site: Path) -> None:
    pages = {page: _Links(page) for page in site.rglob("*.html") if page.name != "404.html"}
    assert len(pages) >= len(PAGES) - 2
    broken = []
    for page, read in pages.items():
        for link in (*read.links, *read.loads):
            path, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:", link) or link.startswith("data:"):
                continue
            target = (page.parent / path).resolve() if path else page
            anchors = pages[target].anchors if target in pages else {unquote(anchor)}
            if not target.exists() or (anchor and unquote(anchor) not in anchors):
                broken.append(f"{page.name}: {link}")
    assert not broken


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    loads = {load for page in site.rglob("*.html") for load in _Links(page).loads}
    assert loads
    assert not [load for load in loads if re.match(r"(https?:)?//", load)]


def test_every_public_name_is_documented_on_the_site(site: Path) -> None:
    anchors = _Links(site / "api.html").anchors
    missing = [
        name
        for name in fedpet.__all__
        if not name.startswith("_") and not any(a.endswith(f".{name}") for a in anchors)
    ]
    assert not missing


def test_every_file_that_the_readme_links_to_exists() -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert len(links) > 10
    assert not [link for link in links if not (REPOSITORY / link).exists()]


def test_the_readme_is_one_page() -> None:
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) < 150
