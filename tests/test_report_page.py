"""The page about a run: loads nothing, adds up, and says what it leaves out."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from report_runs import FULL_PARAMETERS, HEAD_VALUES, make_result

from fedpet.config import BackboneConfig, Experiment, MaskConfig, StructureConfig
from fedpet.errors import InputError
from fedpet.ledger import Ledger
from fedpet.report.books import read_curve, read_rounds
from fedpet.report.numbers import show_percent
from fedpet.report.page import page, write_page, write_png
from fedpet.report.places import find_places
from fedpet.report.reading import read_report
from fedpet.report.results import read_results

FULL = {"backbone": FULL_PARAMETERS, "head": HEAD_VALUES}
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Reader(HTMLParser):
    """Collects a page's tags, attributes and text, and checks that what is opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data.split()

    @property
    def text(self) -> str:
        return " ".join(self.words)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return make_runs(tmp_path)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a run beside two others and a cell file."""
    runs = make_runs(tmp_path_factory.mktemp("runs"))
    return page(read_report(runs / "fedpet", [runs]))


def make_runs(tmp_path: Path) -> Path:
    make_result(tmp_path / "fedpet", refused=2)
    for seed in range(2):
        make_result(
            tmp_path / f"full-{seed}",
            method="full",
            seed=seed,
            message_bytes=90_000_000,
            final=0.82,
            values=FULL,
        )
    cell = {"settings": {"mask": {"density": 0.02}}, "result": make_result(seed=1, final=0.77)}
    (tmp_path / "cell.json").write_text(json.dumps(cell), encoding="utf-8")
    return tmp_path


# Cumulative bytes

amounts = st.integers(0, 10**12)
rounds_of_a_run = st.lists(
    st.tuples(amounts, amounts, amounts, st.none() | st.floats(0, 1)), min_size=1, max_size=12
)


def books(folder: Path, rounds: list[tuple[int, int, int, float | None]]) -> dict[str, Any]:
    """Books of any rounds, the last one measured, and the result they add up to."""
    file = folder / "rounds.jsonl"
    file.unlink(missing_ok=True)
    ledger = Ledger(file)
    for number, (up, down, plan, metric) in enumerate(rounds):
        record = ledger.begin(number)
        ledger.count_client(up=up, down=down, plan=plan)
        record.metric = 0.5 if number == len(rounds) - 1 else metric
        ledger.close()
    sums = {
        f"{kind}_bytes": ledger.total(f"{kind}_bytes") for kind in ("uplink", "downlink", "plan")
    }
    return {
        "path": str(folder / "result.json"),
        "communication": sums | {"total_bytes": sum(sums.values())},
        "quality": {
            "by_round": [
                {"round": record.round, "value": record.metric}
                for record in ledger.rounds
                if record.metric is not None
            ]
        },
    }


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rounds_of_a_run)
def test_cumulative_bytes_never_fall_and_end_at_the_total(
    tmp_path: Path, rounds: list[tuple[int, int, int, float | None]]
) -> None:
    result = books(tmp_path, rounds)
    curve = read_curve(result)
    assert curve.exact
    for sent in ("up", "down", "both"):
        values = [getattr(point, sent) for point in curve.points]
        assert values == sorted(values)
    last = curve.points[-1]
    assert last.both == result["communication"]["total_bytes"]
    assert last.up == result["communication"]["uplink_bytes"]
    assert [point.metric for point in curve.points] == [
        point["value"] for point in result["quality"]["by_round"]
    ]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rounds_of_a_run)
def test_a_result_without_its_rounds_ends_at_the_same_total_and_says_so(
    tmp_path: Path, rounds: list[tuple[int, int, int, float | None]]
) -> None:
    result = books(tmp_path, rounds) | {"path": str(tmp_path / "cell.json")}
    curve = read_curve(result)
    assert not curve.exact
    values = [point.both for point in curve.points]
    assert values == sorted(values)
    assert values[-1] == result["communication"]["total_bytes"]


def test_rounds_that_do_not_add_up_to_the_result_are_refused(runs: Path) -> None:
    file = runs / "fedpet" / "rounds.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join(lines[:-1]), encoding="utf-8")
    with pytest.raises(InputError, match=r"add up to [\d,]+ uplink_bytes, result\.json .* says"):
        read_report(runs / "fedpet")


@pytest.mark.parametrize("line", ["{", "[]", '{"round": 1}', "3"])
def test_a_line_that_is_no_round_is_refused_by_its_number(runs: Path, line: str) -> None:
    with (runs / "fedpet" / "rounds.jsonl").open("a", encoding="utf-8") as file:
        file.write(line)
    with pytest.raises(InputError, match=r"line 6 of .*rounds\.jsonl' lacks "):
        read_rounds(read_results([runs / "fedpet"])[0])


# The page


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
    # 4 runs of 4 rounds, 3 plots in 2 shapes; round 0 has no place on a logarithmic axis
    assert sum("accuracy" in title for title in titles) == 4 * 4 * 3 * 2


def test_a_run_alone_starts_where_nothing_was_sent(tmp_path: Path) -> None:
    make_result(tmp_path / "a")
    text = page(read_report(tmp_path / "a"))
    assert "seed 0, round 0: accuracy 0.5000 after 0 B" in text
    assert "log scale" not in text
    assert text.count('var(--series-0)"></span>') == 1  # the table is legend enough


def test_runs_without_bytes_by_round_are_dashed_and_said_to_be(compared: str, runs: Path) -> None:
    assert "Dashed:" in compared
    assert compared.count("stroke-dasharray: 5.6,2.8") == 3 * 2
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


# Where it trains


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    BertModel(
        BertConfig(
            vocab_size=50,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=16,
        )
    ).save_pretrained(folder)
    return folder


def leave_plan(run: Path, checkpoint: Path, *, broadcast: str) -> None:
    """Put a real plan, its configuration and the model's shape into a run folder."""
    import tomli_w

    from fedpet.backbone import load_backbone
    from fedpet.data import Task
    from fedpet.planning import make_plan
    from fedpet.positions import find_positions
    from fedpet.structure import preset

    experiment = replace(
        Experiment(),
        backbone=BackboneConfig(model=str(checkpoint)),
        mask=MaskConfig(density=0.05, broadcast=broadcast),
        structure=StructureConfig(preset="lnfit+bitfit"),
    )
    backbone = load_backbone(experiment.backbone, num_outputs=2)
    structure = preset(
        "lnfit+bitfit", find_positions(backbone.model, backbone.head), rank=1, scale=1.0
    )
    task = Task("classification", ("bad", "good"), "accuracy")
    plan, pet = make_plan(experiment, backbone, structure, task, "0" * 64)
    (run / "plan.bin").write_bytes(plan.to_bytes())
    (run / "config.toml").write_text(tomli_w.dumps(experiment.to_tables()), encoding="utf-8")
    pet.model.config.save_pretrained(run / "model")


def forget_checkpoint(run: Path, checkpoint: Path) -> None:
    """As if the run had come from another machine."""
    config = run / "config.toml"
    text = config.read_text(encoding="utf-8").replace(str(checkpoint), "an/absent-model")
    config.write_text(text, encoding="utf-8")


def test_a_derived_mask_is_built_again_from_the_checkpoint(
    tmp_path: Path, checkpoint: Path
) -> None:
    make_result(tmp_path)
    leave_plan(tmp_path, checkpoint, broadcast="derived")
    places = find_places(tmp_path)
    assert places.mask is not None
    cells = places.mask.cells.values()
    assert len(cells) == 3 * 6 + 1  # six matrices a layer, and the pooler
    entries = 3 * (4 * 32 * 32 + 2 * 32 * 64) + 32 * 32
    assert sum(cell.entries for cell in cells) == entries
    assert sum(cell.chosen for cell in cells) == int(0.05 * entries)
    kinds = [kind for cell in places.structure.cells.values() for kind in cell.modules]
    assert kinds.count("lnfit") == 3 * 2  # two norms a layer
    assert kinds.count("bitfit") == 3 * 5  # all biases but those of the keys

    density, structure = re.findall(
        r'<table class="heat">.*?</table>', page(read_report(tmp_path)), flags=re.DOTALL
    )
    for (layer, role), cell in places.mask.cells.items():
        words = f"{layer}, {role}: {cell.chosen:,} of {cell.entries:,} entries"
        assert f'title="{words}">{show_percent(cell.chosen / cell.entries)}<' in density
    assert structure.count("lnfit</td>") == 6


def test_an_explicit_mask_needs_no_checkpoint(tmp_path: Path, checkpoint: Path) -> None:
    leave_plan(tmp_path, checkpoint, broadcast="explicit")
    with_checkpoint = find_places(tmp_path)
    forget_checkpoint(tmp_path, checkpoint)
    assert find_places(tmp_path) == with_checkpoint


def test_a_derived_mask_without_its_checkpoint_is_left_out_aloud(
    tmp_path: Path, checkpoint: Path
) -> None:
    make_result(tmp_path)
    leave_plan(tmp_path, checkpoint, broadcast="derived")
    forget_checkpoint(tmp_path, checkpoint)
    places = find_places(tmp_path)
    assert places.mask is None
    assert places.structure.cells  # which needs the model's shape alone
    words = Reader(page(read_report(tmp_path))).text
    assert "not shown: the checkpoint 'an/absent-model' is not on this machine" in words


def test_a_mask_of_another_checkpoint_is_left_out_aloud(tmp_path: Path, checkpoint: Path) -> None:
    import torch
    from transformers import BertModel

    leave_plan(tmp_path, checkpoint, broadcast="derived")
    model = BertModel.from_pretrained(checkpoint)
    with torch.no_grad():
        model.pooler.dense.bias.add_(1)
    model.save_pretrained(tmp_path / "other")
    config = tmp_path / "config.toml"
    text = config.read_text(encoding="utf-8").replace(str(checkpoint), str(tmp_path / "other"))
    config.write_text(text, encoding="utf-8")
    places = find_places(tmp_path)
    assert places.mask is None
    assert "the run's was" in places.left_out


def test_a_run_without_a_plan_says_so(tmp_path: Path) -> None:
    make_result(tmp_path / "full", method="full", values=FULL)
    assert "not shown: the run has no plan" in Reader(page(read_report(tmp_path / "full"))).text


# Bad input, and the command


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
    from fedpet.cli import main

    arguments = ["report", str(runs / "fedpet"), "--compare", str(runs / "full-0")]
    monkeypatch.setattr(sys, "argv", ["fedpet", *arguments, "--png", str(runs / "plot.png")])
    main()
    assert "Page:" in capsys.readouterr().out
    assert (runs / "fedpet" / "report.html").read_text(encoding="utf-8").startswith("<!doctype")
    assert (runs / "plot.png").exists()


def test_the_command_exits_with_2_where_there_is_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fedpet.cli import main

    monkeypatch.setattr(sys, "argv", ["fedpet", "report", str(tmp_path)])
    with pytest.raises(SystemExit) as leaving:
        main()
    assert leaving.value.code == 2
    assert "Error: " in capsys.readouterr().err
