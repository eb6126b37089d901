"""Speech becomes the spectrum of transformers' own extractor, stored without its silence."""

from __future__ import annotations

import io
import json
import wave
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from in_process_run import run
from seq2seq_models import WORDS
from speech_models import RATE, save_model, tone
from task_rows import experiment_maker, write_rows
from tiny import Silent

from fedpet.data.audio import read_audio
from fedpet.data.processors import load_feature_extractor
from fedpet.data.rows import NO_LABEL
from fedpet.data.tokenize import load_tokenizer
from fedpet.errors import DataError
from fedpet.run.prepare import Prepared, prepare
from fedpet.training.generation import Writer
from fedpet.training.token_loss import token_loss

TASK = "speech-to-text"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    save_model(folder / "whisper")
    write_rows(folder / "rows")
    return folder


@pytest.fixture
def experiment(files: Path, tmp_path: Path) -> Any:
    return experiment_maker(files / "rows", lambda task: files / "whisper", tmp_path)


def prepared_of(settings: Any) -> Prepared:
    found = prepare(settings, Silent())
    assert isinstance(found, Prepared)
    return found


def test_a_run_lowers_the_perplexity_and_its_folder_writes_the_same(experiment: Any) -> None:
    from transformers import AutoModelForSpeechSeq2Seq

    settings = experiment(TASK)
    result = run(settings)
    quality = result["quality"]
    assert quality["final"] < quality["before"]
    folder = Path(settings.run.out) / "model"
    assert (folder / "preprocessor_config.json").is_file()
    assert (folder / "tokenizer.json").is_file()
    model = AutoModelForSpeechSeq2Seq.from_pretrained(folder)
    rows = prepared_of(settings).data.evaluation
    batch = rows.batch(np.arange(len(rows)))
    del batch["decoder_input_ids"]
    with torch.no_grad():
        assert model(**batch).loss.item() == pytest.approx(quality["metrics"]["loss"], rel=1e-4)


def test_a_batch_is_the_extractor_s_to_the_bit_and_silence_is_not_stored(
    experiment: Any, files: Path
) -> None:
    rows = prepared_of(experiment(TASK)).data.train
    lines = (files / "rows/train.jsonl").read_text().splitlines()
    chosen = np.array([5, 0, 9])
    speech = [np.array(json.loads(lines[n])["speech"], np.float32) for n in chosen]
    extract = load_feature_extractor(files / "whisper")
    expected = extract(speech, sampling_rate=RATE, return_tensors="pt")["input_features"]
    batch = rows.batch(chosen)
    assert torch.equal(batch["input_features"], expected)
    assert rows.dense is not None
    assert rows.dense.values.size < 0.2 * len(rows) * expected[0].numel()
    taken = rows.take(chosen).batch(np.array([1, 2]))
    for name in ("input_features", "labels", "decoder_input_ids"):
        assert torch.equal(taken[name], batch[name][1:, : taken[name].shape[1]])


@pytest.mark.parametrize("chunk_bytes", [1 << 25, 100])
def test_the_loss_is_transformers_own(chunk_bytes: int, experiment: Any) -> None:
    from transformers.models.whisper.modeling_whisper import shift_tokens_right

    prepared = prepared_of(experiment(TASK))
    batch = prepared.data.train.batch(np.arange(6))
    labels = batch.pop("labels")
    assert (labels[:, 0] != 3).all()  # the start token is read, and no label
    model: Any = prepared.pet.model
    ours = token_loss(model, batch, labels, shift=False, chunk_bytes=chunk_bytes)
    theirs = model(input_features=batch["input_features"], labels=labels).loss
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    inside = labels != NO_LABEL
    shifted = shift_tokens_right(labels, 0, 3)
    assert torch.equal(batch["decoder_input_ids"][inside], shifted[inside])


def test_rates_are_derived_of_random_spectra(experiment: Any) -> None:
    prepared = prepared_of(experiment(TASK, training_learning_rate="auto"))
    rates = prepared.plan.training.learning_rates
    assert {entry.partition("=")[0] for entry in rates} == {"mask", "lnfit"}


def wav(samples: np.ndarray, *, channels: int = 1, rate: int = RATE) -> bytes:
    written = io.BytesIO()
    with wave.open(written, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.repeat(samples.astype("<i2"), channels).tobytes())
    return written.getvalue()


def test_samples_bytes_and_paths_are_one_recording(tmp_path: Path) -> None:
    samples = np.array(tone(np.random.default_rng(1), 440))
    whole = np.round(samples * 32768).clip(-32768, 32767)
    expected = (whole / 32768).astype(np.float32)
    (tmp_path / "one.wav").write_bytes(wav(whole))
    kinds = [expected.tolist(), {"array": expected, "sampling_rate": RATE}, wav(whole),
             wav(whole, channels=2), "one.wav", {"bytes": None, "path": "one.wav"}]  # fmt: skip
    for kind in kinds:
        np.testing.assert_array_equal(read_audio(kind, RATE, tmp_path, "a row"), expected)


@pytest.mark.parametrize("value", ["absent.wav", b"no sound", [], [[0.1]], ["a"], None])
def test_what_is_no_speech_is_refused_by_its_row(value: Any) -> None:
    with pytest.raises(DataError, match="row 3 of the rows has no speech that can be read"):
        read_audio(value, RATE, None, "row 3 of the rows")


def test_another_rate_and_too_long_a_recording_are_refused(
    experiment: Any, files: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="8000 samples a second, and the model takes 16000"):
        read_audio(wav(np.zeros(8), rate=8000), RATE, None, "row 3")
    row = {"speech": [0.0] * (RATE + 1), "text": "good", "client": "a"}
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text((json.dumps(row) + "\n") * 4)
    with pytest.raises(DataError, match=r"row 1 .* 1\.0 seconds of speech, and the model takes 1"):
        prepare(experiment(TASK, data_source=str(tmp_path)), Silent())


def test_what_is_written_for_speech_is_what_the_most_likely_tokens_are_one_by_one(
    experiment: Any, files: Path
) -> None:
    prepared = prepared_of(experiment(TASK))
    rows, model = prepared.data.evaluation, prepared.pet.model
    chosen = np.array([7, 0, 3])
    found = Writer(files / "whisper", 6).write(model, rows, chosen)
    lines = (files / "rows/test.jsonl").read_text().splitlines()
    wanted = [json.loads(lines[n])["text"].split() for n in chosen]
    known = [[word for word in words if word in WORDS] for words in wanted]
    assert [one.wanted.split() for one in found] == known
    for number, one in zip(chosen, found, strict=True):
        batch = rows.batch(np.array([number]))
        ids = [rows.decoder_start]
        with torch.no_grad():
            while len(ids) < 7 and ids[-1] != 1:
                batch["decoder_input_ids"] = torch.tensor([ids])
                inputs = {name: batch[name] for name in ("input_features", "decoder_input_ids")}
                ids.append(int(model(**inputs).logits[0, -1].argmax()))
        words = [WORDS[token] for token in ids[1:] if token > 2]
        assert one.text.split() == words


def test_a_text_is_written_behind_the_tokens_of_language_and_task_that_its_target_begins_with(
    experiment: Any, files: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(files / "whisper")
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.save_pretrained(tmp_path / "marked")
    writer = Writer(tmp_path / "marked", 5)
    prepared = prepared_of(experiment(TASK))
    rows, model = prepared.data.evaluation, prepared.pet.model
    start, stop = rows.offsets[:2]
    target = rows.tokens[start:stop]
    begun = [np.concatenate([np.full(count, 3), target]) for count in (2, 0, 1)]
    offsets = np.cumsum([0, *map(len, begun)])
    several = replace(
        rows.take(np.zeros(3, dtype=np.int64)),
        tokens=np.concatenate(begun).astype(np.int32),
        offsets=offsets,
        marks=np.ones(offsets[-1], np.uint8),
        labels=np.diff(offsets),
    )
    found = writer.write(model, several, np.arange(3))
    assert {one.wanted for one in found} == {writer._text(target)}
    assert [one.prompt.split() for one in found] == [["<s>"] * 2, [], ["<s>"]]
    for count, one in zip((2, 0, 1), found, strict=True):
        ids = [rows.decoder_start, *[3] * count]
        with torch.no_grad():
            for _ in range(5):
                inputs = {
                    "input_features": rows.batch(np.array([0]))["input_features"],
                    "decoder_input_ids": torch.tensor([ids]),
                }
                ids.append(int(model(**inputs).logits[0, -1].argmax()))
                if ids[-1] == 1:
                    break
        assert one.text.split() == [WORDS[token] for token in ids[1 + count :] if token > 3]
