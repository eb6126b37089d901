"""The page about a run: loads nothing, says what the run says, and refuses what is no run."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from html_reader import Reader
from report_runs import make_result, make_runs

from fedpet.errors import InputError
from fedpet.report.loading import read_report
from fedpet.report.page import page, write_page, write_png


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a run beside two others and a cell file."""
    runs = make_runs(tmp_path_factory.mktemp("runs"))
    return page(read_report(runs / "fedpet", [runs]))


def test_a_page_loads_nothing(compared: str) -> None:
    reader = Reader(compared)
    assert not re.search(r"https?:|//\w|@import|data:", compared)
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(reader.tags)
    for name, value in reader.attributes:
        assert name not in ("src", "srcset", "data")
        assert not name.startswith("on")
        if name.endswith("href"):
            assert value.startswith("#")
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", compared))


def test_every_id_of_a_page_is_there_once_and_every_reference_finds_one(compared: str) -> None:
    ids = [value for name, value in Reader(compared).attributes if name == "id"]
    assert len(ids) == len(set(ids))
    referred = set(re.findall(r'(?:url\(|href=")#([^)"]*)', compared))
    assert referred
    assert referred <= set(ids)


def test_every_colour_of_a_plot_follows_the_theme(compared: str) -> None:
    plots = "".join(re.findall(r"<svg.*?</svg>", compared, flags=re.DOTALL))
    assert not re.search(r"#[0-9a-f]{6}\b", re.sub(r"(url\(|href=\")#[^)\"]*", "", plots))
    used = set(re.findall(r"var\((--[\w-]+)\)", plots))
    assert {"--series-0", "--ink", "--muted", "--up"} <= used
    light, dark = compared.split("prefers-color-scheme: dark", 1)
    for variable in used:
        assert f"{variable}: #" in light
        assert f"{variable}: #" in dark


def test_a_page_tells_what_the_result_tells(compared: str) -> None:
    text = Reader(compared).text
    for words in (
        "0.8000 before training 0.5000",
        "63,070",
        "1/2,267",
        "mask 53,084 lnfit 9,216 head 770",
        "client film-1 its training gave NaN",
        "learning-rate 0.001",
        "transformers",
        "f" * 64,
    ):
        assert words in text


def test_a_point_of_a_plot_says_its_round_under_the_pointer(compared: str) -> None:
    titles = re.findall(r"<title>([^<]*)</title>", compared)
    assert "fedpet b, seed 0, round 4: accuracy 0.8000 after 1.52 MB" in titles
    assert "round 1, plan: 3 kB" in titles
    # 4 runs of 4 rounds, in 2 shapes; round 0 has no place on a logarithmic axis
    assert sum("accuracy" in title and "after" in title for title in titles) == 4 * 4 * 2
    assert (
        titles.count("round 4: accuracy 0.8000")
        == titles.count("round 4: training loss 0.2500")
        == 2
    )


def test_a_run_alone_starts_where_nothing_was_sent(tmp_path: Path) -> None:
    make_result(tmp_path / "a")
    text = page(read_report(tmp_path / "a"))
    assert "seed 0, round 0: accuracy 0.5000 after 0 B" in text
    assert "log scale" not in text
    assert text.count('var(--series-0)"></span>') == 1  # the table is legend enough


def test_runs_without_bytes_by_round_are_dashed_and_said_to_be(compared: str, runs: Path) -> None:
    assert "Dashed:" in compared
    assert compared.count("stroke-dasharray: 5.6,2.8") == 2
    assert "Dashed:" not in page(read_report(runs / "fedpet"))


def test_the_same_runs_give_the_same_page(runs: Path) -> None:
    report = read_report(runs / "fedpet")
    assert page(report) == page(report)


def test_names_cannot_break_out_of_the_page(tmp_path: Path) -> None:
    name = "<script>alert(1)</script>\"'&$x$"
    make_result(tmp_path / "a", experiment=name)
    make_result(tmp_path / "b", experiment=name, method='<b "onload=x>', final=0.6)
    report = read_report(tmp_path / "a", [tmp_path / "b"])
    reader = Reader(page(report))
    assert "script" not in reader.tags
    assert "b" not in reader.tags
    assert name in reader.text
    write_png(report, tmp_path / "plot.png")


def test_many_runs_of_many_rounds_fit_on_a_page(tmp_path: Path) -> None:
    for index in range(9):
        make_result(tmp_path / f"{index}", method=f"method-{index}", rounds=60, final=0.6)
    report = read_report(tmp_path / "0", [tmp_path])
    assert len({line.number for line in report.lines}) == 9
    text = page(report)
    Reader(text)
    for group in ("round", "square"):  # beyond seven colours the marker tells
        swatch = f'<span class="swatch {group}" style="--colour: var(--series-0)"></span>'
        assert text.count(swatch) == 2


def test_the_plot_is_written_as_a_png(runs: Path) -> None:
    write_png(read_report(runs / "fedpet", [runs]), runs / "plot.png")
    content = (runs / "plot.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n")
    assert int.from_bytes(content[16:20], "big") == 1600


# -- bad input, and the command --------------------------------------------------------------


def test_a_folder_without_a_finished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not the folder of a finished run"):
        read_report(tmp_path)


def test_runs_of_two_metrics_have_no_page_together(runs: Path) -> None:
    path = runs / "full-0" / "result.json"
    text = path.read_text(encoding="utf-8").replace('"accuracy"', '"matthews"')
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"measured by accuracy, .*full-0.* by matthews"):
        read_report(runs / "fedpet", [runs / "full-0"])


def test_a_page_that_cannot_be_written_is_one_sentence(runs: Path) -> None:
    report = read_report(runs / "fedpet")
    for write in (write_page, write_png):
        with pytest.raises(InputError, match="cannot be written: No such file or directory"):
            write(report, runs / "absent" / "file")


def test_the_command_writes_page_and_plot(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fedpet.cli.main import main

    arguments = ["report", str(runs / "fedpet"), "--compare", str(runs / "full-0")]
    monkeypatch.setattr(sys, "argv", ["fedpet", *arguments, "--png", str(runs / "plot.png")])
    main()
    assert "Page:" in capsys.readouterr().out
    assert (runs / "fedpet" / "report.html").read_text(encoding="utf-8").startswith("<!doctype")
    assert (runs / "plot.png").exists()


def test_the_command_exits_with_2_where_there_is_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fedpet.cli.main import main

    monkeypatch.setattr(sys, "argv", ["fedpet", "report", str(tmp_path)])
    with pytest.raises(SystemExit) as leaving:
        main()
    assert leaving.value.code == 2
    assert "Error: " in capsys.readouterr().err
