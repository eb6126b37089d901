"""Texts that a model writes: prompts, greedy decoding, metrics of them, and what a run shows."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from in_process_run import run
from language_models import experiment_of, make_rows, model_of, save_model
from tiny import Silent

from fedpet.config import Experiment
from fedpet.errors import ConfigError
from fedpet.run.federate import prepare
from fedpet.run.generations import samples_of
from fedpet.run.prepare import Prepared
from fedpet.training import text_metrics
from fedpet.training.generation import Writer, Written

needs_rouge = pytest.mark.skipif(
    importlib.util.find_spec("rouge_score") is None, reason="rouge-score is not installed"
)
needs_bleu = pytest.mark.skipif(
    importlib.util.find_spec("sacrebleu") is None, reason="sacrebleu is not installed"
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("files")
    for name in ("llama", "gpt2"):
        save_model(folder / name, name)
    return folder, make_rows(folder / "rows")


def settings(files: tuple[Path, Path], out: Path, name: str = "llama", **more: Any) -> Experiment:
    return experiment_of(files[0] / name, files[1], out, **more)


def prepared_of(experiment: Experiment) -> Prepared:
    found = prepare(experiment, Silent())
    assert isinstance(found, Prepared)
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_is_written_in_batches_is_what_the_most_likely_tokens_are_one_by_one(
    name: str, files: tuple[Path, Path], tmp_path: Path
) -> None:
    rows = prepared_of(settings(files, tmp_path / "run", name)).data.evaluation
    model = model_of(name)
    writer = Writer(files[0] / name, 7)
    found = writer.write(model, rows, np.arange(len(rows)))
    for index, one in enumerate(found):
        inside = slice(rows.offsets[index], rows.offsets[index + 1])
        tokens, marks = rows.tokens[inside], rows.marks[inside]
        last = len(marks) - int(np.argmax(marks[::-1]))
        start = last - int(np.argmin(marks[:last][::-1]))
        ids = tokens[:start].tolist()
        with torch.no_grad():
            for _ in range(7):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] == 2:
                    break
        text = writer._tokenizer.decode(ids[start:], skip_special_tokens=True).strip()
        assert one.text == text
        assert one.wanted == writer._text(tokens[start:last])
        assert one.prompt == writer._tokenizer.decode(tokens[:start])


def test_a_sampling_checkpoint_is_decoded_greedily_and_keeps_its_own_settings(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    rows = prepared_of(settings(files, tmp_path / "run")).data.evaluation
    model, other = model_of("llama"), model_of("llama")
    other.generation_config.update(do_sample=True, temperature=2.0, top_k=5, max_length=20)
    kept = other.generation_config.to_dict()
    writer = Writer(files[0] / "llama", 9)
    both = [writer.write(one, rows, np.arange(4)) for one in (model, other)]
    assert both[0] == both[1]
    assert other.generation_config.to_dict() == kept


def test_no_text_is_written_beyond_the_positions_of_a_model(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    rows = prepared_of(settings(files, tmp_path / "run", "gpt2")).data.evaluation
    found = Writer(files[0] / "gpt2", 500).write(model_of("gpt2"), rows, np.arange(3))
    assert max(len(f"{one.prompt} {one.text}".split()) for one in found) <= 64


PAIRS = [
    Written("", "the film is good", "the film is good"),
    Written("", "a good film", "the film is bad"),
    Written("", "", "fine"),
]


@needs_rouge
def test_rouge_is_the_longest_common_subsequence_of_words() -> None:
    # 4 of 4 words; "film" of 3 and 4 words: 2 * (1/3 * 1/4) / (1/3 + 1/4); nothing.
    assert text_metrics.text_metrics(["rouge_l"], PAIRS)["rouge_l"] == pytest.approx(
        (1 + 2 / 7 + 0) / 3
    )


@needs_bleu
def test_chrf_and_bleu_are_sacrebleu_s_as_fractions() -> None:
    import sacrebleu

    texts, wanted = [p.text for p in PAIRS], [[p.wanted for p in PAIRS]]
    found = text_metrics.text_metrics(["chrf", "bleu", "exact_match"], PAIRS)
    assert found["chrf"] == sacrebleu.corpus_chrf(texts, wanted).score / 100
    assert found["bleu"] == sacrebleu.corpus_bleu(texts, wanted).score / 100
    assert found["exact_match"] == pytest.approx(1 / 3)
    perfect = text_metrics.text_metrics(["chrf", "bleu"], PAIRS[:1] * 2)
    assert perfect == pytest.approx({"chrf": 1.0, "bleu": 1.0})


def test_a_library_that_is_missing_is_named_with_its_extra_before_the_run_begins(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "fedpet.utils.extras.find_spec",
        lambda name: None if name in ("rouge_score", "sacrebleu") else find(name),
    )
    for name, package in (("rouge_l", "rouge_score"), ("chrf", "sacrebleu")):
        experiment = settings(files, tmp_path / "run", data_metrics=[name])
        with pytest.raises(
            ConfigError, match=rf"'{name}' needs {package}, .* `pip install 'fedpet\[generation\]'`"
        ):
            prepare(experiment, Silent())


def test_a_run_decides_by_the_texts_that_its_model_writes(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    experiment = settings(
        files, tmp_path / "run", data_metric="exact_match", data_max_new_tokens=3, run_keep="best",
        data_max_eval_rows=6,
    )  # fmt: skip
    result = run(experiment)
    quality = result["quality"]
    assert quality["metric"] == "exact_match"
    assert 0 <= quality["final"] == quality["metrics"]["exact_match"] <= 1
    assert quality["metrics"]["perplexity"] > 1
    assert len(quality["by_round"]) == 3


def test_metrics_of_texts_belong_to_tasks_that_write_and_to_the_server(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"'chrf' does not measure data\.task = 'classification'"):
        Experiment.from_tables({"data": {"metric": "chrf"}})
    with pytest.raises(ConfigError, match=r"'chrf' is taken of texts that the server's model"):
        settings(files, tmp_path / "run", data_metric="chrf", clients_eval_fraction=0.3)


@pytest.mark.parametrize("task", ["instruction", "language-modelling"])
def test_a_run_leaves_what_its_model_writes_before_and_after_and_the_report_shows_it(
    task: str, files: tuple[Path, Path], tmp_path: Path
) -> None:
    from fedpet.report.loading import read_report
    from fedpet.report.page import page

    experiment = settings(
        files,
        tmp_path / "run",
        data_task=task,
        training_learning_rate=0.05,
        data_max_new_tokens=5,
        run_sample_prompts=3,
    )
    result = run(experiment)
    entries = json.loads((tmp_path / "run" / "generations.json").read_text(encoding="utf-8"))
    assert len(entries) == len({entry["prompt"] for entry in entries}) == 3
    assert all(list(entry) == ["prompt", "wanted", "before", "after"] for entry in entries)
    assert [e["before"] for e in entries] != [e["after"] for e in entries]
    assert "generations" not in json.dumps(result)
    text = page(read_report(tmp_path / "run"))
    assert "What the model writes" in text
    words = entries[0]["wanted"].split()
    assert " ".join(words) in text
    assert len(entries[0]["after"].split()) <= 5


def test_what_was_written_before_stays_beside_what_is_written_after_for_the_same_prompt(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    rows = prepared_of(settings(files, tmp_path / "run")).data.evaluation
    writer, model = Writer(files[0] / "llama", 4), model_of("llama")
    first = samples_of(model, rows, writer, 3, earlier=[], when="before")
    trained = model_of("llama", seed=1)
    both = samples_of(trained, rows, writer, 3, earlier=first, when="after")
    assert [entry["before"] for entry in both] == [entry["before"] for entry in first]
    assert [entry["prompt"] for entry in both] == [entry["prompt"] for entry in first]
    other = samples_of(trained, rows, writer, 3, earlier=first[::-1], when="after")
    assert ["before" in entry for entry in other] == [False, True, False]
    assert len(samples_of(model, rows, writer, 10**6, earlier=[], when="before")) == len(rows)


def test_no_prompt_is_left_where_none_is_asked_for_and_a_classifier_has_none(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    import tiny

    silent = settings(files, tmp_path / "silent", run_sample_prompts=0)
    few = settings(files, tmp_path / "few", run_sample_prompts=1)
    hashes = {run(one)["final_values_sha256"] for one in (silent, few)}
    assert len(hashes) == 1
    assert not (tmp_path / "silent" / "generations.json").exists()
    assert len(json.loads((tmp_path / "few" / "generations.json").read_text())) == 1
    classes = tiny.make_experiment(
        tiny.make_backbone(tmp_path / "backbone"), tiny.make_rows(tmp_path / "rows"),
        tmp_path / "classes",
    )  # fmt: skip
    run(classes)
    assert not (tmp_path / "classes" / "generations.json").exists()
