"""Classify texts by writing words: T5 with random weights on two data sets, in one process each.

    python -m benchmarks.text_to_text --data FOLDER [--only sst2]

In:  FOLDER/sst2 and FOLDER/mrpc, with train.jsonl.gz and validation.jsonl.gz.
Out: a checkpoint for each below --folder; benchmarks/results/text_to_text/NAME.json.

The T5 has two blocks on either side, 64 wide; its tokeniser is a byte-pair model of the training
texts and the classes' words. Equal texts give equal files.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.cell import ROOT
from benchmarks.local_job import run_local
from fedpet.config import Experiment

NAMES = ("sst2", "mrpc")
VOCABULARY, WIDTH, SEED = 4000, 64, 0
SPECIAL = ["<pad>", "</s>", "<unk>"]


def main() -> None:
    """Make the checkpoints that are not there, and run the experiments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path("text_to_text"))
    parser.add_argument("--only", choices=NAMES)
    asked = parser.parse_args()
    for name in NAMES if asked.only is None else (asked.only,):
        experiment = Experiment.from_file(ROOT / f"benchmarks/experiments/text_to_text_{name}.toml")
        backbone, source = asked.folder / name, asked.data / name
        if not (backbone / "model.safetensors").is_file():
            words = experiment.data.label_names
            write_backbone(backbone, [*texts(source, experiment.data.text_columns), *words])
        experiment = replace(
            experiment,
            backbone=replace(experiment.backbone, model=str(backbone.absolute())),
            data=replace(experiment.data, source=str(source.absolute())),
        )
        command = f"python -m benchmarks.text_to_text --data FOLDER --only {name}"
        out = ROOT / f"benchmarks/results/text_to_text/{name}.json"
        quality = run_local(experiment, command, out)["quality"]
        losses = [round(point["value"], 3) for point in quality["loss_by_round"]]
        print(f"{name}: {quality['metric']} {quality['before']:.3f} -> {quality['final']:.3f}, "
              f"loss by round {losses}")  # fmt: skip


def texts(source: Path, columns: Sequence[str]) -> Iterator[str]:
    """Yield the training texts."""
    with gzip.open(source / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            yield from (row[column] for column in columns)


def write_backbone(folder: Path, words: Sequence[str]) -> None:
    """Write a random T5 and a tokeniser of these texts, which ends each with its end token."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(
        words,
        trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, show_progress=False),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    config = T5Config(
        d_model=WIDTH,
        d_kv=16,
        d_ff=2 * WIDTH,
        num_layers=2,
        num_heads=4,
        vocab_size=tokenizer.get_vocab_size(),
    )
    config.decoder_start_token_id = 0
    torch.manual_seed(SEED)
    T5ForConditionalGeneration(config).save_pretrained(folder)


if __name__ == "__main__":
    main()
