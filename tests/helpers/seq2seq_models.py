"""Small random models with an encoder and a decoder, and their tokeniser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

MODELS = ("t5", "t5-untied", "bart")
WORDS = ["<pad>", "</s>", "<unk>", "<s>", "good", "bad", "fine", "film", "plot", "is", "the", "not"]


def save_tokenizer(folder: Path) -> None:
    """Save a tokeniser of words, which ends each text with its end token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)


def model_of(name: str) -> Any:
    """Make a random T5, tied or not, or BART."""
    import transformers as t

    torch.manual_seed(0)
    if name == "bart":
        config: Any = t.BartConfig(
            d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
            vocab_size=len(WORDS), max_position_embeddings=64, pad_token_id=0, bos_token_id=3,
            eos_token_id=1, decoder_start_token_id=1, forced_eos_token_id=None,
        )  # fmt: skip
    else:
        config = t.T5Config(
            d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=len(WORDS),
            decoder_start_token_id=0, tie_word_embeddings=name == "t5",
        )  # fmt: skip
    model = t.AutoModelForSeq2SeqLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def save_model(folder: Path, name: str) -> Path:
    """Save a model with its tokeniser."""
    model_of(name).save_pretrained(folder)
    save_tokenizer(folder)
    return folder
