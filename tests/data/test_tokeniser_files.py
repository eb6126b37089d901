"""The tokeniser that a checkpoint ships: told from others, used, saved beside the plain model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from shipped import WORDS, ship, tokenizer_of
from tiny import Silent
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fedpet.config import Experiment
from fedpet.data import hash_tokenizer
from fedpet.data.saved_tokenizer import save_tokenizer
from fedpet.data.tokenize import tokenize_rows
from fedpet.errors import DataError, RunError
from fedpet.run.central_search import search_centrally

WORDPIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "film", "x", "##x", "<", ">"]


def pieces_with_added_tokens(folder: Path, **changes: Any) -> Path:
    """A BERT whose tokeniser is vocab.txt and added_tokens.json, as older checkpoints have it."""
    ship("bert", folder, **changes)
    for file in folder.glob("*token*"):
        file.unlink()
    (folder / "vocab.txt").write_text("\n".join(WORDPIECES) + "\n")
    added = {"filmx": len(WORDPIECES), "<e1>": len(WORDPIECES) + 1}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    return folder


def tokens_of(folder: Path, texts: list[str]) -> list[list[int]]:
    return list(AutoTokenizer.from_pretrained(folder)(texts)["input_ids"])


# How it is told from others.


@pytest.mark.parametrize("name", ["spm.model", "sentencepiece.bpe.model", "tokenizer.model"])
def test_a_sentencepiece_model_is_a_tokeniser_and_its_bytes_are_in_the_hash(
    tmp_path: Path, name: str
) -> None:
    hashes = set()
    for content in (b"one", b"another"):
        (tmp_path / name).write_bytes(content)
        hashes.add(hash_tokenizer(tmp_path))
    assert len(hashes) == 2


def test_the_hash_of_a_checkpoint_with_tokenizer_json_is_of_that_file_alone(
    tmp_path: Path,
) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    before = hash_tokenizer(tmp_path)
    (tmp_path / "spm.model").write_bytes(b"one")
    assert hash_tokenizer(tmp_path) == before
    assert before == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


# What it makes.


@pytest.mark.parametrize("installed", [False, True])  # a version that cannot read it is no help
def test_a_sentencepiece_model_that_cannot_be_read_here_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    monkeypatch.setattr("fedpet.data.tokenize.find_spec", lambda _: installed or None)
    ship("t5", tmp_path)
    for file in tmp_path.glob("*token*"):
        file.unlink()
    (tmp_path / "spiece.model").write_bytes(b"not a model")
    with pytest.raises(
        DataError, match=r"cannot be loaded: .*pip install 'sentencepiece<0\.2\.3'`"
    ):
        tokenize_rows([["a text"]], tmp_path, 8, "a test")


def test_a_tokeniser_that_is_code_of_the_checkpoint_is_refused_without_a_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("it asked"))
    ship("bert", tmp_path)
    own = {"AutoTokenizer": ["mine.Tokenizer", None]}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "OfNoLibrary", "auto_map": own})
    )
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "of no library", "auto_map": {"AutoConfig": "mine.Config"}})
    )
    with pytest.raises(DataError, match=r"code that comes with the checkpoint, which fedpet does"):
        tokenize_rows([["a text"]], tmp_path, 8, "a test")


def test_a_vocabulary_that_is_not_found_is_refused_and_not_taken_for_an_empty_one(
    tmp_path: Path,
) -> None:
    ship("roberta", tmp_path)
    for file in tmp_path.glob("*token*"):
        file.unlink()
    (tmp_path / "sentencepiece.bpe.model").write_bytes(b"of another kind of model")
    with pytest.raises(DataError, match=r"knows special tokens alone: RobertaTokenizer found no"):
        tokenize_rows([["a text"]], tmp_path, 8, "a test")


def test_an_added_token_without_an_embedding_is_named_before_the_run(tmp_path: Path) -> None:
    folder = pieces_with_added_tokens(tmp_path, vocab_size=len(WORDPIECES))
    tokenize_rows([["good film"]], folder, 8, "a test")
    with pytest.raises(
        DataError, match=r"^a text of a test holds the token '<e1>', number 12 .* for 11: .*resize"
    ):
        tokenize_rows([["good film", "good filmx", "good <e1>"]], folder, 8, "a test")


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_text_that_spells_the_end_token_out_is_refused_where_the_classifier_reads_it(
    tmp_path: Path, name: str
) -> None:
    ship(name, tmp_path)
    texts = ["good film", "bad film", "a </s> of good"]
    tokenize_rows([texts[:2], texts[:2]], tmp_path, 16, "a test")
    with pytest.raises(DataError, match=r"^the text 'a </s> of good' of a test comes to 2 end tok"):
        tokenize_rows([texts], tmp_path, 16, "a test")
    ship("roberta", tmp_path / "encoder")
    tokenize_rows([texts], tmp_path / "encoder", 16, "a test")


def test_a_tokeniser_that_ends_no_text_is_refused_where_the_classifier_reads_its_end(
    tmp_path: Path,
) -> None:
    endless = tokenizer_of("t5")
    endless.backend_tokenizer.post_processor = None
    ship("t5", tmp_path, tokenizer=endless)
    with pytest.raises(DataError, match=r"^the text 'good film' .* comes to 0 end tokens .*'</s>'"):
        tokenize_rows([["good film", "bad film"]], tmp_path, 16, "a test")


def test_a_search_refuses_what_a_run_does(tmp_path: Path) -> None:
    folder = ship("bert", tmp_path / "made", vocab_size=7)
    (tmp_path / "rows").mkdir()
    rows = [json.dumps({"text": "good film", "label": index % 2}) for index in range(8)]
    (tmp_path / "rows" / "train.jsonl").write_text("\n".join(rows) + "\n")
    tables = {
        "run": {"cache": str(tmp_path / "cache")},
        "backbone": {"model": str(folder)},
        "data": {"source": str(tmp_path / "rows"), "eval-split": "train"},
    }
    with pytest.raises(DataError, match="holds the token 'film'"):
        search_centrally(Experiment.from_tables(tables), tmp_path / "structure.json", Silent())


# What is saved.


def test_added_tokens_are_read_from_the_plain_model_as_in_training(tmp_path: Path) -> None:
    checkpoint = pieces_with_added_tokens(tmp_path / "made")
    save_tokenizer(checkpoint, tmp_path / "model")
    texts = ["good filmx", "a <e1> film", "filmxx", "xx"]
    assert tokens_of(tmp_path / "model", texts) == tokens_of(checkpoint, texts)
    assert tokens_of(checkpoint, texts[:1]) == [[2, 5, len(WORDPIECES), 3]]


@pytest.mark.parametrize(
    ("kind", "name", "tokenizer"),
    [
        ("llama", "tokenizer.model", "LlamaTokenizer"),
        ("deberta-v2", "spm.model", "DebertaV2Tokenizer"),
        ("roberta", "sentencepiece.bpe.model", "XLMRobertaTokenizer"),
    ],
)
def test_a_sentencepiece_model_is_read_from_the_plain_model_as_in_training(
    tmp_path: Path, kind: str, name: str, tokenizer: str
) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    checkpoint = ship(kind, tmp_path / "made", vocab_size=400)
    for file in checkpoint.glob("*token*"):
        file.unlink()
    texts = [" ".join(WORDS[i % 11 :] + WORDS[: i % 7]) for i in range(99)]
    with (checkpoint / name).open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=file,
            model_type="bpe" if kind == "llama" else "unigram",
            vocab_size=60,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": tokenizer}))
    expected = tokens_of(checkpoint, texts[:3])
    assert len({*map(tuple, expected)}) == 3
    save_tokenizer(checkpoint, tmp_path / "model")
    assert tokens_of(tmp_path / "model", texts[:3]) == expected


def test_a_chat_template_and_the_longest_text_go_along(tmp_path: Path) -> None:
    made = tokenizer_of("llama", model_max_length=77)
    made.chat_template = "{{ messages[0]['content'] }}"
    save_tokenizer(ship("llama", tmp_path / "made", tokenizer=made), tmp_path / "model")
    saved = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert (saved.model_max_length, saved.chat_template) == (77, made.chat_template)
    settings = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    assert not {"local_files_only", "trust_remote_code"} & {*settings}


@pytest.mark.parametrize("lost", ["added", "padding"])
def test_a_tokeniser_that_is_not_saved_as_it_was_is_a_failure_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    checkpoint = ship("bert", tmp_path / "made")
    save = PreTrainedTokenizerFast.save_pretrained

    def lossy(self: Any, folder: Any) -> Any:
        kept = save(self, folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            text = (Path(folder) / name).read_text()
            old, new = ('"[CLS]"', '"[SEP]"') if lost == "added" else ('"right"', '"left"')
            (Path(folder) / name).write_text(text.replace(old, new))
        return kept

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", lossy)
    with pytest.raises(RunError, match=r"does not read texts as .*Serve the model with the tok"):
        save_tokenizer(checkpoint, tmp_path / "model")
