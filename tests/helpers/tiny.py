"""A random two-layer BERT, its tokeniser, and a few rows with clients: real files, soon made."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from sending import LOSSLESS

from fedpet.config import Experiment
from fedpet.run.callbacks import Callback


class Silent(Callback):
    """Shows nothing."""


WORDS = ["good", "bad", "fine", "dull", "bright", "grim", "film", "plot", "cast", "score", "the"]
WORDS += ["a", "of", "and", "is", "was", "not", "very"]


def make_tokenizer(folder: Path) -> int:
    """Save a tokeniser of the words below beside a checkpoint; the size of its vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: index for index, word in enumerate(specials + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    ).save_pretrained(folder)
    return len(vocabulary)


def make_backbone(folder: Path, *, seed: int = 0) -> Path:
    """Save a random BERT encoder with its tokeniser; the head is absent, as in a checkpoint."""
    from transformers import BertConfig, BertModel

    vocabulary_size = make_tokenizer(folder)
    torch.manual_seed(seed)
    model = BertModel(
        BertConfig(
            vocab_size=vocabulary_size,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=64,
            initializer_range=0.2,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def config_alone(backbone: Path, folder: Path) -> Path:
    """A copy of a backbone's config.json, with nothing beside it."""
    folder.mkdir()
    file = folder / "config.json"
    file.write_text((backbone / "config.json").read_text())
    return file


def make_rows(folder: Path, *, clients: int = 6, rows_per_client: int = 12) -> Path:
    """Write train and test rows: the label says whether "good" is in the text."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(7)
    for split, count in (("train", clients * rows_per_client), ("test", 40)):
        lines = []
        for index in range(count):
            words = list(generator.choice(WORDS[2:], size=int(generator.integers(3, 9))))
            label = int(generator.integers(2))
            words.insert(0, WORDS[label])
            client = f"client {index % clients}"
            lines.append(json.dumps({"text": " ".join(words), "label": label, "client": client}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def make_experiment(backbone: Path, rows: Path, out: Path, **changes: object) -> Experiment:
    """An experiment over those files; `changes` are `stage_key=value`."""
    tables: dict[str, dict[str, object]] = {
        "run": {"name": "tiny", "out": str(out), "workers": 2, "cache": str(out.parent / "cache")},
        "backbone": {"model": str(backbone)},
        "data": {"source": str(rows), "max-length": 16},
        "clients": {"client-column": "client", "min-rows": 2},
        "mask": {"density": 0.05},
        "structure": {"preset": "lnfit+ln-bias+hiwi-bias+lora", "rank": 2},
        "training": {"learning-rate": 0.01, "batch-size": 4},
        "codec": {key.replace("_", "-"): value for key, value in LOSSLESS.items()},
        "strategy": {"num-rounds": 3, "clients-per-round": 4},
    }
    for key, value in changes.items():
        stage, _, name = key.partition("_")
        tables.setdefault(stage, {})[name.replace("_", "-")] = value
    return Experiment.from_tables(tables)
