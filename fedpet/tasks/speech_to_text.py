"""Write the words of speech, by a model with an encoder of sound and a decoder (Whisper).

`data.text-columns` names the column of speech, see fedpet/data/audio.py, and `data.response-column`
its text. The checkpoint's own feature extractor makes each spectrum once. Loss, weights and metrics
are those of "seq2seq", `wer` (the rate of errors in words) the usual one of texts that the model
writes; `data.max-length` cuts the text.

Whisper's tokeniser writes the start token before a text, and the decoder reads one already: as in
transformers' own examples it is taken off, so that it is no label.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedpet.errors import ConfigError, DataError
from fedpet.tasks.seq2seq import Seq2Seq
from fedpet.tasks.task_kind import Encoding, RawRows, register_task

if TYPE_CHECKING:
    from fedpet.config import DataConfig
    from fedpet.data.padding import Padding
    from fedpet.data.split_rows import Split
    from fedpet.tasks.task import Task

__all__ = ["SpeechToText"]

_STEP = 16  # recordings between two reports


@register_task("speech-to-text")
class SpeechToText(Seq2Seq):
    """Write the words of speech."""

    model_class = "AutoModelForSpeechSeq2Seq"
    pipeline = "automatic-speech-recognition"
    reads_files = True

    def check_data(self, data: DataConfig) -> None:
        """Ask for speech and its text; see `TaskKind.check_data`."""
        super().check_data(data)
        if len(data.text_columns) != 1:
            raise ConfigError(
                f"data.text-columns must name the one column of speech for data.task = "
                f"{data.task!r}, got {list(data.text_columns)}."
            )

    def read(self, split: Split, data: DataConfig, task: Task) -> RawRows:
        """Read texts, and leave the speech for `encode`; see `TaskKind.read`."""
        speech = split.read().column(data.text_columns[0], "data.text-columns", split.where)
        texts = split.read().column(data.response_column, "data.response-column", split.where)
        split.check_texts([texts], [data.response_column])
        nothing = np.zeros(len(texts), dtype=np.int64)
        return RawRows([speech, texts], nothing, folder=split.folder)

    def encode(self, rows: RawRows, how: Encoding) -> tuple[dict[str, Any], Padding]:
        """Make spectra, and tokenise the texts; see `TaskKind.encode`."""
        from fedpet.data.array_spool import ArraySpool
        from fedpet.data.audio import read_audio
        from fedpet.data.marked_tokens import MarkedTokens
        from fedpet.data.processors import load_feature_extractor

        made = MarkedTokens(how.folder, how.data.max_length, how.where, how.spools)
        start, extract = made.decoder_start(), load_feature_extractor(how.folder)
        frames, counts, shape = ArraySpool(np.float32, how.spools), [], (0, 0)
        cut = {"truncation": True, "max_length": how.data.max_length}
        speech, texts = rows.columns
        for done, number in enumerate(how.numbers.tolist(), start=1):
            place = f"row {number + 1} of {how.where}"
            samples = read_audio(speech[number], extract.sampling_rate, rows.folder, place)
            if len(samples) > getattr(extract, "n_samples", len(samples)):
                raise DataError(
                    f"{place} has {len(samples) / extract.sampling_rate:.1f} seconds of speech, "
                    f"and the model takes {extract.chunk_length}: cut the recording and its text."
                )
            found = extract(samples, sampling_rate=extract.sampling_rate, return_tensors="np")
            spectrum = np.ascontiguousarray(found["input_features"][0].T, dtype=np.float32)
            unlike = np.flatnonzero((spectrum != spectrum[-1]).any(1))
            count = int(unlike[-1]) + 2 if len(unlike) else 1
            frames.append(spectrum[:count].reshape(-1))
            counts.append(count)
            shape = spectrum.shape
            ids = made.tokenizer(text_target=texts[number], **cut)["input_ids"]
            ids = ids[1:] if ids[0] == start else ids
            made.append(ids, [1] * len(ids))
            if done % _STEP == 0 or done == len(how.numbers):
                how.on_rows(done)
        tokens = getattr(made.config, "max_source_positions", None) or shape[0]
        return made.arrays() | {
            "decoder_start": np.array([start]),
            "frames": frames,
            "frame_offsets": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            "frame_shape": np.array(shape[::-1]),
            "tokens_each": np.array([tokens]),
        }, made.padding

    def tokenizer_hash(self, folder: Path) -> str:
        """Hash the feature extractor with the tokeniser; see `TaskKind.tokenizer_hash`."""
        from fedpet.data.processors import hash_processor

        both = f"{super().tokenizer_hash(folder)}\0{hash_processor(folder)}"
        return hashlib.sha256(both.encode()).hexdigest()
