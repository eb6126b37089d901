"""A small random Whisper of one second, with its feature extractor and a tokeniser of words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from seq2seq_models import WORDS, save_tokenizer

RATE, BINS = 16000, 8


def model_of() -> Any:
    """Make a random Whisper, which begins to write with "<s>"."""
    import transformers as t

    torch.manual_seed(0)
    config = t.WhisperConfig(
        vocab_size=len(WORDS), num_mel_bins=BINS, encoder_layers=2, encoder_attention_heads=4,
        decoder_layers=2, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
        d_model=32, max_source_positions=50, max_target_positions=32, pad_token_id=0,
        bos_token_id=3, eos_token_id=1, decoder_start_token_id=3, suppress_tokens=None,
        begin_suppress_tokens=None,
    )  # fmt: skip
    model: Any = t.WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def save_model(folder: Path) -> Path:
    """Save the model with what reads speech and texts."""
    from transformers import WhisperFeatureExtractor

    model_of().save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=BINS, chunk_length=1).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def tone(generator: np.random.Generator, pitch: int) -> list[float]:
    """Make a tenth of a second of a tone with noise, in steps of a thousandth."""
    time = np.arange(RATE // 10) / RATE
    values = 0.5 * np.sin(2 * np.pi * pitch * time) + 0.1 * generator.normal(size=len(time))
    return [round(float(value), 3) for value in np.clip(values, -1, 1)]
