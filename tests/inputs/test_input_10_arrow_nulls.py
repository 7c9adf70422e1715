"""Arrow fills a column with nulls where a row lacks it: null is absent, key by key."""

import pytest
from data_rows import byte_tokenizer, split_text, turns, write

from melinoe.data import encode, load_examples

CHAT = turns(("user", "hi"), ("assistant", "yo"))
EVERY = [
    *("messages", "conversations", "prompt", "completion", "label", "text", "question", "answer"),
    *("instruction", "response", "output", "context", "input", "tools", "documents", "system"),
    *("chat_template_kwargs", "images", "weight", "chosen", "rejected", "completions", "labels"),
]
ROWS = {
    "text": {"text": "ab"},
    "messages": {"messages": CHAT},
    "conversations": {"conversations": [{"from": "human", "value": "hi"}, CHAT[1]]},
    "prompt and completion": {"prompt": "p", "completion": "c"},
    "turns": {"prompt": CHAT[:1], "completion": CHAT[1:]},
    "question": {"question": "q", "answer": "a"},
    "Dolly": {"instruction": "i", "response": "r"},
    "Alpaca": {"instruction": "i", "output": "o"},
}


@pytest.mark.parametrize("form", ROWS)
def test_a_null_column_is_an_absent_column(tmp_path, form, caplog):
    """Every other key of every form is null: the row reads as it does without them."""
    tokenizer = byte_tokenizer()
    filled = dict.fromkeys(EVERY) | ROWS[form]
    path = write(tmp_path / "rows.jsonl", ROWS[form], filled)
    plain, with_nulls = encode(load_examples(path), tokenizer, 999)
    assert plain == with_nulls
    assert not caplog.text


@pytest.mark.parametrize(
    "key", ["tool_calls", "name", "tool_call_id", "thinking", "from", "value", "weight", "train"]
)
def test_a_null_in_a_turn_is_absent(tmp_path, key, caplog):
    """Arrow gives every turn the keys of all turns."""
    chat = [{**turn, key: None} for turn in CHAT]
    (encoded,) = encode(
        load_examples(write(tmp_path / "rows.jsonl", {"messages": chat})), byte_tokenizer(), 999
    )
    assert split_text(encoded, byte_tokenizer()) == ("<u>hi</><a>", "yo</>")
    assert not caplog.text


def test_turns_of_both_spellings_share_a_column(tmp_path):
    """`role` null beside `from`, and the other way round."""
    chat = [
        {"from": "human", "value": "hi", "role": None, "content": None},
        {"from": None, "value": None, "role": "assistant", "content": "yo"},
    ]
    (example,) = load_examples(write(tmp_path / "rows.jsonl", {"conversations": chat}))
    assert list(example.messages) == CHAT
