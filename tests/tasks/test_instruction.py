"""Conversations: the answers' tokens are labels, whatever the template, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from language_models import CHATML, MARKED, make_rows, save_tokenizer

from fedpet.config import ClientsConfig, DataConfig
from fedpet.data import FederatedData, load_data
from fedpet.errors import ConfigError, DataError
from fedpet.tasks.chat_spans import ChatRenderer, Turns

ALL = ClientsConfig(partition="iid", num_clients=1, min_rows=1)
ASKED = ("user", "is the film good")
END = "<|im_end|>"
# As templates do that drop the reasoning of earlier answers, and prompt for the next one's.
REASONING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ 'very\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\nvery\n' }}{% endif %}"
)
ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m['content'] }}{% endfor %}"
)


@pytest.fixture(scope="module", params=["by ids", "by marks"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, CHATML if request.param == "by ids" else MARKED)
    return folder


def renderer(template: str | None, most: int, tmp_path: Path) -> tuple[ChatRenderer, Any]:
    made = save_tokenizer(tmp_path, template)
    return ChatRenderer(made, most, "there"), made


def answers(found: tuple[list[int], list[int]], tokenizer: Any) -> list[str]:
    """Return the words of each run of marked tokens."""
    ids, marks = found
    edges = np.flatnonzero(np.diff([0, *marks, 0]))
    return [
        " ".join(tokenizer.convert_ids_to_tokens(ids[start:stop]))
        for start, stop in zip(edges[::2], edges[1::2], strict=True)
    ]


def words(found: tuple[list[int], list[int]], tokenizer: Any) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(found[0])).replace("\n", "/")


def load(rows: list[dict[str, Any]], folder: Path, tokenizer: Path, **keys: Any) -> FederatedData:
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(
        source=str(folder), task="instruction", metric="perplexity", max_length=48, **keys
    )
    return load_data(data, ALL, tokenizer, cache=folder / "cache")


def labels_of(data: FederatedData, row: int, tokenizer: Path) -> str:
    from transformers import AutoTokenizer

    made, batch = AutoTokenizer.from_pretrained(tokenizer), data.train.batch(np.array([row]))
    chosen = batch["labels"][batch["labels"] != -100]
    return " ".join(made.convert_ids_to_tokens(chosen.tolist()))


TURNS: Turns = (
    ("system", "fine"),
    ASKED,
    ("assistant", "very good"),
    ("user", "and the cast"),
    ("assistant", "bad"),
)


@pytest.mark.parametrize("template", [CHATML, MARKED, REASONING])
def test_the_answers_and_the_tokens_that_end_them_are_marked(template: str, tmp_path: Path) -> None:
    made, tokenizer = renderer(template, 64, tmp_path)
    found = made.encode(TURNS, 0, "here")
    assert answers(found, tokenizer) == [f"very good {END}", f"bad {END}"]
    assert words(found, tokenizer).startswith(f"<|im_start|> system / fine {END} / <|im_start|>")


def test_turns_behind_the_last_answer_are_left_out(tmp_path: Path) -> None:
    made, _ = renderer(CHATML, 64, tmp_path)
    assert made.encode((*TURNS, ASKED), 0, "here") == made.encode(TURNS, 0, "here")


def test_a_long_conversation_loses_its_oldest_exchanges_and_keeps_the_system_turn(
    tmp_path: Path,
) -> None:
    made, tokenizer = renderer(CHATML, 64, tmp_path)
    whole = made.encode(TURNS, 0, "here")
    shorter = (TURNS[0], *TURNS[3:])
    alone = made.encode(shorter, 0, "here")
    made, tokenizer = renderer(CHATML, len(whole[0]) - 1, tmp_path)
    found = made.encode(TURNS, 0, "here")
    assert found == alone
    assert answers(found, tokenizer) == [f"bad {END}"]


def test_as_many_of_the_newest_exchanges_stay_as_fit(tmp_path: Path) -> None:
    turns: Turns = tuple(turn for word in ("good", "bad", "fine", "film") for turn in
                         (("user", "is"), ("assistant", word)))  # fmt: skip
    made, tokenizer = renderer(CHATML, 64, tmp_path)
    three = len(made.encode(turns[2:], 0, "here")[0])
    for most, kept in ((three, 3), (three - 1, 2), (three + 1, 3)):
        made, tokenizer = renderer(CHATML, most, tmp_path)
        found = answers(made.encode(turns, 0, "here"), tokenizer)
        assert found == [f"{word} {END}" for word in ("bad", "fine", "film")[-kept:]]


def test_the_last_answer_is_cut_at_its_end_and_refused_where_nothing_of_it_is_left(
    tmp_path: Path,
) -> None:
    turns: Turns = (ASKED, ("assistant", "very good and fine"))
    made, tokenizer = renderer(CHATML, 64, tmp_path)
    _, marks = made.encode(turns, 0, "here")
    start = marks.index(1)
    cut, _ = renderer(CHATML, start + 2, tmp_path)
    assert answers(cut.encode(turns, 0, "here"), tokenizer) == ["very good"]
    gone, _ = renderer(CHATML, start, tmp_path)
    with pytest.raises(DataError, match=r"row 7 of here has nothing of its answer") as refused:
        gone.encode(turns, 6, "here")
    assert f"data.max-length = {start} tokens" in str(refused.value)
    assert not {"very", "good", "cast"} & set(str(refused.value).split())


def test_a_tokeniser_without_a_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no chat template"):
        renderer(None, 64, tmp_path)


def test_turns_that_the_template_refuses_are_named_by_row_and_roles(tmp_path: Path) -> None:
    made, _ = renderer(ALTERNATING, 64, tmp_path)
    with pytest.raises(DataError, match=r"row 3 of here, roles user, user, assistant") as refused:
        made.encode((ASKED, ASKED, ("assistant", "bad")), 2, "here")
    assert "roles must alternate" in str(refused.value)
    assert "film" not in str(refused.value)


def test_rows_of_turns_become_labels_that_are_their_answers(
    tokenizer: Path, tmp_path: Path
) -> None:
    rows = [{"messages": [{"role": role, "content": text} for role, text in TURNS]}] * 2
    data = load(rows, tmp_path, tokenizer, messages_column="messages")
    assert labels_of(data, 0, tokenizer) == f"very good {END} bad {END}"
    assert data.train.labels.tolist() == [5, 5]


def test_a_question_in_two_columns_and_its_answer_are_a_conversation(
    tokenizer: Path, tmp_path: Path
) -> None:
    columns: dict[str, Any] = {"text_columns": ("instruction", "input")}
    rows = [
        {"instruction": "is the film good", "input": "of a cast", "response": "very bad"},
        {"instruction": "is the film good", "input": "", "response": "fine"},
    ]
    data = load(rows, tmp_path, tokenizer, **columns, response_column="response")
    assert labels_of(data, 0, tokenizer) == f"very bad {END}"
    assert labels_of(data, 1, tokenizer) == f"fine {END}"
    turns = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": a}]}
        for question, a in (("is the film good\n\nof a cast", "very bad"), (ASKED[1], "fine"))
    ]
    other = tmp_path / "turns"
    other.mkdir()
    again = load(turns, other, tokenizer, messages_column="messages")
    assert np.array_equal(data.train.tokens, again.train.tokens)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ([{"role": "user", "content": "secret"}], "row 2 of .* has no answer"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}], "no answer"),
        ([], "row 2 of .* has no answer"),
        ("secret", "row 2 of .* has no turns in column 'messages'"),
        ([{"role": "user"}], "row 2 of .* has no turns"),
        ([{"role": "user", "content": None}], "row 2 of .* has no turns"),
        (None, "row 2 of .* has no turns"),
    ],
)
def test_a_row_that_is_no_conversation_is_refused_by_its_number_alone(
    row: Any, sentence: str, tokenizer: Path, tmp_path: Path
) -> None:
    good = [{"role": "user", "content": "is"}, {"role": "assistant", "content": "fine"}]
    with pytest.raises(DataError, match=sentence) as refused:
        load([{"messages": good}, {"messages": row}], tmp_path, tokenizer,
             messages_column="messages")  # fmt: skip
    assert "secret" not in str(refused.value)


def test_an_absent_response_is_refused_by_its_row(tokenizer: Path, tmp_path: Path) -> None:
    rows = [{"text": "is", "response": "fine"}, {"text": "is", "response": None}]
    with pytest.raises(DataError, match=r"row 2 of .* has no answer"):
        load(rows, tmp_path, tokenizer, response_column="response")
    rows[1] = {"text": " ", "response": "fine"}
    with pytest.raises(DataError, match=r"row 2 of .* asks nothing"):
        load(rows, tmp_path, tokenizer, response_column="response")


@pytest.mark.parametrize("columns", [{}, {"messages_column": "a", "response_column": "b"}])
def test_one_kind_of_columns_must_be_named(columns: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="name one of messages-column and response-column"):
        DataConfig(task="instruction", metric="perplexity", **columns)


def test_conversations_are_held_out_by_what_they_say(tokenizer: Path, tmp_path: Path) -> None:
    source = make_rows(tmp_path, clients=4, rows=20)
    data = DataConfig(
        source=str(source / "train.jsonl"), task="instruction", metric="perplexity", max_length=32,
        messages_column="messages", eval_split="", eval_fraction=0.25,
    )  # fmt: skip
    found = load_data(data, ALL, tokenizer, cache=tmp_path / "cache")
    assert len(found.train) + len(found.evaluation) == 80
    assert 5 < len(found.evaluation) < 40
