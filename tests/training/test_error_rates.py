"""Error rates of texts that a model writes are of all rows together, and the less the better."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from in_process_run import run
from speech_models import save_model
from task_rows import experiment_maker, write_rows
from tiny import Silent

from fedpet.config import Experiment
from fedpet.errors import ConfigError, InputError
from fedpet.run.prepare import prepare
from fedpet.training.generation import Written
from fedpet.training.metrics import METRICS, greater_is_better, register_metric
from fedpet.training.text_metrics import text_metrics

pytestmark = pytest.mark.filterwarnings("ignore:Passing `generation_config`")
needs_jiwer = pytest.mark.skipif(
    importlib.util.find_spec("jiwer") is None, reason="jiwer is not installed"
)
CLASSES = "multi-label-classification"
texts = st.lists(st.sampled_from(["good", "bad", "film", "Film", "is"]), max_size=6).map(" ".join)
pairs = st.lists(st.builds(Written, st.just(""), texts, texts), min_size=1, max_size=6)


def rates(written: list[Written]) -> dict[str, float]:
    return text_metrics(["wer", "cer"], written)


@needs_jiwer
def test_rates_are_errors_of_all_rows_by_what_is_wanted_in_all() -> None:
    written = [
        Written("", "the film good", "the film is good"),  # "is" and a blank are missing
        Written("", "a a plot not", "a plot"),  # "a" and "not" with their blanks are too many
        Written("", "fine", "fine"),
        Written("", "Fine", "fine"),  # another word
    ]
    assert rates(written) == pytest.approx({"wer": 4 / 8, "cer": (3 + 6 + 0 + 1) / (16 + 6 + 8)})
    by_row = [rates([one])["wer"] for one in written]
    assert np.mean(by_row) == pytest.approx((1 / 4 + 1 + 0 + 1) / 4)  # which is not it


@needs_jiwer
@given(written=pairs)
def test_rates_are_the_library_s_over_the_whole_and_the_order_of_rows_does_not_matter(
    written: list[Written],
) -> None:
    import jiwer

    wanted, found = [one.wanted for one in written], [one.text for one in written]
    assert rates(written) == {
        "wer": jiwer.process_words(wanted, found).wer,
        "cer": jiwer.process_characters(wanted, found).cer,
    }
    assert rates(written[::-1]) == rates(written)
    assert rates([Written("", one, one) for one in wanted]) == {"wer": 0.0, "cer": 0.0}


@needs_jiwer
def test_words_where_none_is_wanted_are_errors_and_a_rate_without_any_wanted_is_their_number() -> (
    None
):
    some = Written("", "good film", "good film")
    assert rates([some, Written("", "is bad", "")])["wer"] == 2 / 2
    assert rates([some, Written("", "", "")])["wer"] == 0.0
    assert rates([Written("", "is bad", "")]) == {"wer": 2.0, "cer": 6.0}
    assert rates([Written("", "", "")]) == {"wer": 0.0, "cer": 0.0}


@pytest.mark.parametrize("name", ["wer", "cer"])
def test_less_is_better_and_tasks_that_write_texts_for_speech_or_texts_have_it(name: str) -> None:
    assert not greater_is_better(name)
    data = {"metric": name, "response-column": "text"}
    for task in ("speech-to-text", "seq2seq"):
        found = Experiment.from_tables({"data": {**data, "task": task}})
        assert found.data.metric == name
    for task in ("classification", "text-to-text-classification", "instruction"):
        with pytest.raises(ConfigError, match=rf"'{name}' does not measure data\.task = '{task}'"):
            Experiment.from_tables({"data": {**data, "task": task}})


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    save_model(folder / "whisper")
    write_rows(folder / "rows")
    return folder


@pytest.fixture
def experiment(files: Path, tmp_path: Path) -> Any:
    return experiment_maker(files / "rows", lambda task: files / "whisper", tmp_path)


def test_a_task_that_writes_no_such_text_is_refused_before_a_row_is_read(experiment: Any) -> None:
    settings = experiment(
        "multi-label-classification", data_metrics=["wer"], data_source="/not there"
    )
    with pytest.raises(
        ConfigError,
        match=rf"'wer', which is taken of texts .* data\.task = '{CLASSES}' has no such "
        r"metric: leave it out, or take a task of seq2seq, speech-to-text\.$",
    ):
        prepare(settings, Silent())


def test_a_user_s_own_metric_of_that_name_is_the_user_s(
    experiment: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(METRICS, "_functions", dict(METRICS._functions))
    register_metric("cer", greater_is_better=True)(lambda found: 0.5)
    settings = experiment(
        "multi-label-classification", data_metrics=["cer"], data_source="/not there"
    )
    with pytest.raises(InputError, match="not there"):  # the next that is wrong
        prepare(settings, Silent())


def test_a_library_that_is_missing_is_named_with_its_extra(
    experiment: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "fedpet.utils.extras.find_spec", lambda name: None if name == "jiwer" else find(name)
    )
    for name in ("wer", "cer"):
        settings = experiment("speech-to-text", data_metrics=[name])
        with pytest.raises(
            ConfigError, match=rf"'{name}' needs jiwer, .* `pip install 'fedpet\[generation\]'`"
        ):
            prepare(settings, Silent())


@needs_jiwer
def test_a_run_on_speech_keeps_the_round_with_the_fewest_errors(experiment: Any) -> None:
    settings = experiment(
        "speech-to-text", data_metric="wer", data_metrics=["cer"], data_max_new_tokens=8,
        run_keep="best",
    )  # fmt: skip
    quality = run(settings)["quality"]
    values = [one["value"] for one in quality["by_round"]]
    assert len(values) == 4
    assert quality["metric"] == "wer"
    assert quality["final"] == quality["metrics"]["wer"] == min(values) < quality["before"]
    assert quality["metrics"]["cer"] > 0
    assert quality["metrics"]["perplexity"] > 1
