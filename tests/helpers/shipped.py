"""Checkpoints as they ship: each architecture with its configuration class's own defaults.

Only sizes are shrunk. Which tokens a configuration and a tokeniser name is what the published
checkpoints of the kind name: GPT-2, Llama and Mistral have no padding token in either, Qwen2 in its
tokeniser alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedpet.backbone.pretrained import load_backbone
from fedpet.config import BackboneConfig

WORDS = ["good", "bad", "fine", "dull", "bright", "grim", "film", "plot", "cast", "score", "the"]
_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
_BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}


@dataclass(frozen=True)
class Kind:
    """An architecture, and the special tokens of its tokeniser.

    Attributes:
        config: Name of the configuration's class.
        sizes: What is shrunk, and for T5 what every T5's config.json adds to the defaults.
        specials: The tokeniser's special tokens, by what they are for: word and id.
        form: How a text is dressed.
        types: Whether the tokeniser makes token type ids.
    """

    config: str
    sizes: dict[str, Any]
    specials: dict[str, tuple[str, int]]
    form: str
    types: bool = False


_BERT = {"pad": ("[PAD]", 0), "unk": ("[UNK]", 1), "cls": ("[CLS]", 2), "sep": ("[SEP]", 3)}
_ROBERTA = {"cls": ("<s>", 0), "pad": ("<pad>", 1), "sep": ("</s>", 2), "unk": ("<unk>", 3)}
_LLAMA = {"unk": ("<unk>", 0), "bos": ("<s>", 1), "eos": ("</s>", 2)}
_MODERN = {
    "unk": ("[UNK]", 50280),
    "cls": ("[CLS]", 50281),
    "sep": ("[SEP]", 50282),
    "pad": ("[PAD]", 50283),
}
_SMALL = {**_SIZES, "vocab_size": 60}
KINDS = {
    "bert": Kind("BertConfig", _SMALL, _BERT, "[CLS] $A [SEP]", types=True),
    "roberta": Kind("RobertaConfig", _SMALL, _ROBERTA, "<s> $A </s>"),
    "distilbert": Kind(
        "DistilBertConfig",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 60},
        _BERT,
        "[CLS] $A [SEP]",
    ),
    "mpnet": Kind("MPNetConfig", _SMALL, _ROBERTA, "<s> $A </s>"),
    "albert": Kind(
        "AlbertConfig", {**_SMALL, "embedding_size": 16}, _BERT, "[CLS] $A [SEP]", types=True
    ),
    "electra": Kind(
        "ElectraConfig", {**_SMALL, "embedding_size": 16}, _BERT, "[CLS] $A [SEP]", types=True
    ),
    "deberta": Kind("DebertaConfig", _SMALL, _BERT, "[CLS] $A [SEP]", types=True),
    "deberta-v2": Kind("DebertaV2Config", _SMALL, _BERT, "[CLS] $A [SEP]", types=True),
    "modernbert": Kind("ModernBertConfig", _SIZES, _MODERN, "[CLS] $A [SEP]"),
    "xlnet": Kind(
        "XLNetConfig",
        {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "vocab_size": 60},
        {"unk": ("<unk>", 0), "cls": ("<cls>", 3), "sep": ("<sep>", 4), "pad": ("<pad>", 5)},
        "$A:0 <sep>:0 <cls>:2",
        types=True,
    ),
    "t5": Kind(
        "T5Config",
        {**_T5, "vocab_size": 60, "decoder_start_token_id": 0},
        {"pad": ("<pad>", 0), "eos": ("</s>", 1), "unk": ("<unk>", 2)},
        "$A </s>",
    ),
    "bart": Kind("BartConfig", {**_BART, "vocab_size": 60}, _ROBERTA, "<s> $A </s>"),
    "gpt2": Kind(
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 4},
        {"unk": ("<|endoftext|>", 50256), "eos": ("<|endoftext|>", 50256)},
        "$A",
    ),
    "llama": Kind("LlamaConfig", _SMALL, _LLAMA, "<s> $A"),
    "mistral": Kind("MistralConfig", {**_SMALL, "num_key_value_heads": 2}, _LLAMA, "<s> $A"),
    "qwen2": Kind(
        "Qwen2Config",
        {**_SIZES, "num_key_value_heads": 2, "vocab_size": 300},
        {"pad": ("<|endoftext|>", 256), "unk": ("<|endoftext|>", 256), "eos": ("<|im_end|>", 257)},
        "$A",
    ),
}


def config_of(name: str, **changes: Any) -> Any:
    import transformers

    kind = KINDS[name]
    return getattr(transformers, kind.config)(**{**kind.sizes, **changes})


def tokenizer_of(name: str, **changes: Any) -> Any:
    """The kind's tokeniser; words begin at token 6."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    kind = KINDS[name]
    if name == "qwen2":
        return _bytes_of_qwen2(kind, **changes)
    vocabulary = {word: 6 + index for index, word in enumerate(WORDS)}
    vocabulary |= dict(kind.specials.values())
    unused = {*range(6)} - {*vocabulary.values()}
    vocabulary |= {f"<unused{number}>": number for number in unused}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=kind.specials["unk"][0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=kind.form,
        pair=f"{kind.form} {kind.form.replace('$A', '$B')}",
        special_tokens=list(kind.specials.values()),
    )
    inputs = ["input_ids", *(["token_type_ids"] if kind.types else []), "attention_mask"]
    named = {f"{use}_token": word for use, (word, _) in kind.specials.items()}
    return PreTrainedTokenizerFast(
        **{"tokenizer_object": tokenizer, "model_input_names": inputs, **named, **changes}
    )


def _bytes_of_qwen2(kind: Kind, **changes: Any) -> Any:
    """One token a byte: transformers takes no tokeniser of words for a Qwen2."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    vocabulary = {byte: index for index, byte in enumerate(sorted(ByteLevel.alphabet()))}
    named = {f"{use}_token": word for use, (word, _) in kind.specials.items()}
    vocabulary |= dict(kind.specials.values())
    return Qwen2Tokenizer(vocab=vocabulary, merges=[], **{**named, **changes})


def ship(name: str, folder: Path, *, tokenizer: Any = None, **changes: Any) -> Path:
    """Save a random model of this kind with a head, and its tokeniser."""
    import transformers

    torch.manual_seed(0)
    config = config_of(name, **changes)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    (tokenizer or tokenizer_of(name)).save_pretrained(folder)
    return folder


def load(folder: Path, num_outputs: int = 2) -> Any:
    config = BackboneConfig(model=str(folder))
    regression = num_outputs == 1
    return load_backbone(config, num_outputs=num_outputs, regression=regression).model
