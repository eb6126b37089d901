"""Small random language models with a tokeniser for chat, and rows of texts and conversations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sending import LOSSLESS

from fedpet.config import Experiment

WORDS = ["good", "bad", "fine", "film", "plot", "cast", "the", "a", "of", "and", "is", "very"]
ROLES = ["system", "user", "assistant"]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "[UNK]"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MODELS = ("llama", "llama-tied", "gpt2")
VOCABULARY = SPECIALS + WORDS + ROLES + ["\n"]


def save_tokenizer(folder: Path, template: str | None = CHATML) -> Any:
    """Save a tokeniser of words and line ends, whose padding is its end token, as SmolLM2's."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(" "), behavior="removed"),
            pre_tokenizers.Split(Regex("\n"), behavior="isolated"),
        ]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<|endoftext|>"],
    )
    if template is not None:
        made.chat_template = template
    made.save_pretrained(folder)
    return made


def model_of(name: str, seed: int = 0) -> Any:
    """A random model: Llama with grouped keys, its output layer tied or not; or GPT-2, tied."""
    import transformers as t

    torch.manual_seed(seed)
    size = len(VOCABULARY)
    if name == "gpt2":
        config: Any = t.GPT2Config(
            n_embd=32, n_layer=2, n_head=4, vocab_size=size, n_positions=64, bos_token_id=2,
            eos_token_id=2,
        )  # fmt: skip
    else:
        config = t.LlamaConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=64, vocab_size=size, max_position_embeddings=64, bos_token_id=1,
            eos_token_id=2, pad_token_id=2, tie_word_embeddings=name == "llama-tied",
        )  # fmt: skip
    model = t.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.add_(noise, alpha=0.1 if parameter.dim() == 1 else 0.2)
    return model


def save_model(folder: Path, name: str = "llama-tied", template: str | None = CHATML) -> Path:
    """Save a model with its tokeniser; they may have no template."""
    model_of(name).save_pretrained(folder)
    save_tokenizer(folder, template)
    return folder


def sentence(generator: np.random.Generator, words: int) -> str:
    return " ".join(generator.choice(WORDS, size=words))


def make_rows(folder: Path, *, clients: int = 4, rows: int = 8) -> Path:
    """Write texts, conversations and questions with answers; client i's are longer than i - 1's."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(3)
    for split in ("train", "test"):
        lines = []
        for index in range(clients * rows):
            client = index % clients
            asked, answer = sentence(generator, 3), sentence(generator, 2 + 2 * client)
            turns = [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": sentence(generator, 2)},
                {"role": "user", "content": sentence(generator, 2)},
                {"role": "assistant", "content": answer},
            ]
            lines.append(
                {
                    "text": sentence(generator, 4 + 3 * client),
                    "messages": turns[-2:] if index % 3 else turns,
                    "instruction": asked,
                    "input": "" if index % 2 else sentence(generator, 2),
                    "response": answer,
                    "client": f"client {client}",
                }
            )
        (folder / f"{split}.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
        )
    return folder


def experiment_of(backbone: Path, rows: Path, out: Path, **changes: Any) -> Experiment:
    """A run of two rounds; `changes` are `stage_key=value`."""
    tables: dict[str, dict[str, Any]] = {
        "run": {
            "name": "language",
            "out": str(out),
            "cache": str(out.parent / "cache"),
            "sample-prompts": 0,
        },
        "backbone": {"model": str(backbone)},
        "data": {
            "source": str(rows),
            "task": "instruction",
            "messages-column": "messages",
            "max-length": 32,
            "metric": "perplexity",
        },
        "clients": {"client-column": "client", "min-rows": 2},
        "mask": {"density": 0.05},
        "structure": {"preset": "lnfit", "rank": 2},
        "training": {"learning-rate": 0.01, "batch-size": 4},
        "codec": {key.replace("_", "-"): value for key, value in LOSSLESS.items()},
        "strategy": {"num-rounds": 2, "clients-per-round": 3},
    }
    for key, value in changes.items():
        stage, _, name = key.partition("_")
        tables.setdefault(stage, {})[name.replace("_", "-")] = value
    if tables["data"]["task"] == "language-modelling":
        del tables["data"]["messages-column"]
    return Experiment.from_tables(tables)
