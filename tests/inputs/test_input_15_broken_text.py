"""Text that is none: halves of characters, bytes that are no UTF-8, nothing at all."""

import io
import json
import sys

import pytest
from data_rows import byte_tokenizer, learned, turns, write

from melinoe.data import Example, load_examples
from melinoe.errors import DataError
from melinoe.generate import prompt_ids
from melinoe.shipped import TINY_OLMOE

HALF = "a\ud83d"
ROWS = [
    {"text": HALF},
    {"prompt": HALF, "completion": "c"},
    {"prompt": "p", "completion": HALF},
    {"question": HALF, "answer": "a"},
    {"instruction": "i", "context": HALF, "response": "r"},
    {"messages": turns(("user", HALF), ("assistant", "yo"))},
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": HALF}]},
            *turns(("gpt", "y")),
        ]
    },
    {"messages": turns(("user", "hi"), ("assistant", "yo")), "tools": [{"name": HALF}]},
    {"messages": turns(("user", "hi"), ("assistant", "yo")), "tools": [{HALF: 1}]},
]


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_half_of_a_character_is_named_by_file_and_row(tmp_path, row):
    """JSON can write it, no tokenizer can read it; whole pairs pass."""
    path = write(tmp_path / "r.jsonl", {"text": "\U0001f600"}, row)
    with pytest.raises(DataError, match=r"r\.jsonl:2 in .* half of a character \(\\ud83d\)"):
        load_examples(path)
    assert len(load_examples(path, limit=1)) == 1


def test_examples_made_by_hand_are_checked_too():
    """The row is named by what its maker called it."""
    with pytest.raises(DataError, match="here:1 in its"):
        Example("p", HALF, "here:1")


@pytest.mark.parametrize(
    ("name", "blob", "words"),
    [
        ("r.jsonl", b'{"text": "a"}\n{"text": "\xe4"}\n', r":2 is not UTF-8 text \(byte 0xe4\)"),
        ("r.csv", b"text\na\n\xe4\n", r":3 is not UTF-8 text \(byte 0xe4\)"),
        ("r.jsonl", '{"text": "a"}\n'.encode("utf-16"), r":1 is not UTF-8 text \(byte 0xff\)"),
        ("r.jsonl", b'{"text": "a"}\n' + b"\0" * 4096, ":2 is not JSON"),
        ("r.jsonl", b'{"text": "a\0b"}\n', ":1 is not JSON"),
        ("r.jsonl", b"\0" * 64, ":1 is not JSON"),
        ("r.jsonl", b"", "has no rows"),
        ("r.jsonl", b"\xef\xbb\xbf", "has no rows"),
        ("r.jsonl", b" \n\t\n", "has no rows"),
        ("r.json", b" ", "has no rows"),
    ],
)
def test_bytes_that_are_no_rows_are_one_sentence(tmp_path, name, blob, words):
    """With file and line where there is one."""
    (tmp_path / name).write_bytes(blob)
    with pytest.raises(DataError, match=words) as raised:
        load_examples(tmp_path / name)
    assert str(tmp_path / name) in str(raised.value) and "\n" not in str(raised.value)


def test_a_null_character_and_a_very_long_line_are_text(tmp_path):
    """Both are odd, and both are what the row says."""
    row = {"prompt": "a\0b", "completion": "c" * 9000}
    assert learned(write(tmp_path / "r.jsonl", row), byte_tokenizer()) == (
        "a\0b",
        "c" * 9000 + "<eos>",
    )
    write(tmp_path / "r.jsonl", {"text": "x" * 2_000_000})
    assert len(load_examples(tmp_path / "r.jsonl")[0].completion) == 2_000_000


def test_a_prompt_that_is_no_text_is_one_sentence():
    """An argument of the command line carries bytes that are no UTF-8 in such halves."""
    for half in (HALF, "a\udce4"):
        with pytest.raises(DataError, match="the prompt has half of a character"):
            prompt_ids(byte_tokenizer(), half)


@pytest.fixture
def generate_from(melinoe, monkeypatch):
    """Run `melinoe generate tiny -` on these bytes: (exit code, stdout, stderr)."""

    def run(stdin):
        given = None if stdin is None else io.TextIOWrapper(io.BytesIO(stdin), encoding="ascii")
        monkeypatch.setattr(sys, "stdin", given)
        return melinoe("generate", "tiny", "-", "--max-new-tokens", 2, "--json")

    return run


@pytest.mark.parametrize(
    ("stdin", "words"),
    [
        (b"caf\xe9", "not UTF-8 text (byte 0xe9 at place 3)"),
        (b"\xff\xfea\0", "not UTF-8 text (byte 0xff at place 0)"),
        (b"", "is empty"),
        (b" \n", "is empty"),
        (None, "is closed"),
        (b"x" * ((16 << 20) + 1), "more than 16 MiB"),
    ],
    ids=["Latin-1", "UTF-16", "nothing", "blank", "closed", "endless"],
)
def test_standard_input_that_is_no_prompt_is_one_sentence(stdin, words, generate_from):
    """Before any model is opened: one line, exit 1."""
    code, out, err = generate_from(stdin)
    assert (code, out) == (1, "")
    assert err.startswith("melinoe: standard input") and err.count("\n") == 1 and words in err


def test_standard_input_is_utf8_whatever_the_locale(generate_from):
    """A byte-order mark is no part of the prompt; the rest is, as it came."""
    assert TINY_OLMOE.is_dir()
    text = "Question: ä?\nAnswer:"
    code, out, err = generate_from(text.encode("utf-8-sig"))
    assert code == 0, err
    assert json.loads(out)["prompt"] == text
