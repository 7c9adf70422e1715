"""
Each field of each of TRL's forms, in each spelling: used, refused by name, or counted.

Standard forms hold strings, conversational ones lists of turns.
"""

import pytest
from data_rows import byte_tokenizer, learned, turns, write

from melinoe.data import encode_prompts, load_examples
from melinoe.errors import DataError

USER, YO = turns(("user", "hi"), ("assistant", "yo"))
CHAT = [USER, YO]
SHARED = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
SHOWN = ("<u>hi</><a>", "yo</>")

# Row, then the text that is shown and the text that is learned.
USED = {
    "language modeling": ({"text": "ab"}, ("a", "b<eos>")),
    "language modeling, messages": ({"messages": CHAT}, SHOWN),
    "language modeling, conversations": ({"conversations": SHARED}, SHOWN),
    "language modeling, roles in conversations": ({"conversations": CHAT}, SHOWN),
    "language modeling, from and value in messages": ({"messages": SHARED}, SHOWN),
    "prompt-completion": ({"prompt": "hi", "completion": " yo"}, ("hi", " yo<eos>")),
    "prompt-completion, empty prompt": ({"prompt": "", "completion": "yo"}, ("y", "o<eos>")),
    "prompt-completion, turns": ({"prompt": [USER], "completion": [YO]}, SHOWN),
    "prompt-completion, from and value": (
        {"prompt": SHARED[:1], "completion": SHARED[1:]},
        SHOWN,
    ),
    "unpaired preference, good": (
        {"prompt": "hi", "completion": " yo", "label": True},
        ("hi", " yo<eos>"),
    ),
    "unpaired preference, good turns": (
        {"prompt": [USER], "completion": [YO], "label": True},
        SHOWN,
    ),
}


@pytest.mark.parametrize("form", USED)
def test_a_form_is_used(tmp_path, form, caplog):
    """What is shown and what is learned, by hand; nothing is left to say."""
    row, expected = USED[form]
    assert learned(write(tmp_path / "r.jsonl", row), byte_tokenizer()) == expected
    assert not caplog.text


REFUSED = {
    "prompt-only": ({"prompt": "hi"}, "nothing to learn"),
    "prompt-only, turns": ({"prompt": [USER]}, "nothing to learn"),
    "prompt-completion, mixed": ({"prompt": [USER], "completion": "yo"}, '"prompt" that is not'),
    "prompt-completion, mixed otherwise": (
        {"prompt": "hi", "completion": [YO]},
        '"completion" that is not a string',
    ),
    "prompt-completion, nobody answers": (
        {"prompt": [USER], "completion": [USER]},
        "no assistant turn to learn from",
    ),
    "language modeling, nobody answers": ({"messages": [USER]}, "no assistant turn"),
    "language modeling, an empty answer": (
        {"messages": [USER, {**YO, "content": " "}]},
        "no assistant turn",
    ),
    "language modeling, an empty text": ({"text": " "}, 'an empty "text"'),
    "language modeling, no string": ({"text": 5}, '"text" that is not a string'),
    "preference": (
        {"prompt": "hi", "chosen": "yo", "rejected": "no"},
        "--columns prompt=prompt,completion=chosen",
    ),
    "preference, implicit prompt": (
        {"chosen": "hi yo", "rejected": "hi no"},
        "--columns text=chosen",
    ),
    "preference, turns": (
        {"prompt": [USER], "chosen": [YO], "rejected": [YO]},
        "--columns prompt=prompt,completion=chosen",
    ),
    "preference, turns, implicit prompt": (
        {"chosen": CHAT, "rejected": CHAT},
        "--columns messages=chosen",
    ),
    "preference, a prompt beside whole chats": (
        {"prompt": "hi", "chosen": CHAT, "rejected": CHAT},
        "--columns messages=chosen",
    ),
    "unpaired preference, bad": (
        {"prompt": "hi", "completion": " no", "label": False},
        '"label" False',
    ),
    "unpaired preference, bad turns": (
        {"prompt": [USER], "completion": [YO], "label": False},
        '"label" False',
    ),
    "unpaired preference, rated by number": (
        {"prompt": "hi", "completion": " no", "label": 3},
        '"label" 3',
    ),
    "stepwise supervision": (
        {"prompt": "hi", "completions": ["a", "b"], "labels": [True, False]},
        "rated steps",
    ),
    "token ids": ({"input_ids": [1, 2], "labels": [1, 2]}, r"\['input_ids', 'labels'\]"),
    "a turn without a role": ({"messages": [{"content": "hi"}, YO]}, 'turn 0 without a "role"'),
    "a turn without content": ({"messages": [{"role": "user"}, YO]}, 'turn 0 without a "content"'),
    "a turn that is a string": ({"messages": ["hi", YO]}, "turn 0 that is no object"),
    "content that is a number": ({"messages": [{**USER, "content": 5}, YO]}, "neither a string"),
    "messages as JSON": ({"messages": '[{"role": "user"}]'}, "no list of turns"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_a_form_is_refused_by_name(tmp_path, form):
    """One sentence that names file, row, reason and the way out."""
    row, words = REFUSED[form]
    with pytest.raises(DataError, match=words) as raised:
        load_examples(write(tmp_path / "r.jsonl", row))
    said = str(raised.value)
    assert f"{tmp_path / 'r.jsonl'}:1 " in said and "\n" not in said


@pytest.mark.parametrize("form", [name for name in REFUSED if name.startswith("preference")])
def test_the_way_out_of_a_pair_works(tmp_path, form):
    """What the message says to give learns the chosen answer."""
    row, columns = REFUSED[form]
    path = write(tmp_path / "r.jsonl", row)
    shown, answer = learned(path, byte_tokenizer(), columns=columns.partition(" ")[2])
    assert "yo" in answer and "no" not in shown + answer


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "hi"}, "hi"),
        ({"prompt": [USER]}, "<u>hi</><a>"),
        ({"prompt": SHARED[:1]}, "<u>hi</><a>"),
        ({"prompt": "hi", "completion": "yo"}, "hi"),
        ({"prompt": [USER], "completion": [YO]}, "<u>hi</><a>"),
        ({"messages": [*CHAT, USER, YO]}, "<u>hi</><a>yo</><u>hi</><a>"),
        ({"question": "q?", "answer": "a"}, "Question: q?\nAnswer:"),
    ],
)
def test_prompts_alone_are_prompts(tmp_path, row, prompt):
    """Where nothing is learned, a prompt needs no completion, and the others give theirs."""
    tokenizer = byte_tokenizer()
    examples = load_examples(write(tmp_path / "r.jsonl", row), prompts=True)
    assert [tokenizer.decode(ids) for ids in encode_prompts(examples, tokenizer)] == [prompt]


def test_plain_text_is_no_prompt(tmp_path):
    """Answered from nothing, row after row, it would look like prompts; the way out works."""
    path = write(tmp_path / "r.jsonl", {"text": "abcdefgh"})
    with pytest.raises(DataError, match="--columns prompt=text"):
        load_examples(path, prompts=True)
    tokenizer = byte_tokenizer()
    with pytest.raises(DataError, match="--columns prompt=text"):
        encode_prompts(load_examples(path), tokenizer)
    named = load_examples(path, prompts=True, columns="prompt=text")
    assert [tokenizer.decode(ids) for ids in encode_prompts(named, tokenizer)] == ["abcdefgh"]
    (half,) = encode_prompts(load_examples(path), tokenizer, text_tokens=6)
    assert tokenizer.decode(half) == "abc"
