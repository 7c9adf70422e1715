"""Rows become prompts, completions and masks; every unusable row names its file and line."""

import pytest
import torch
from data_rows import byte_tokenizer, split_text, write

from melinoe.data import Collator, Encoded, encode, encode_prompts, load_examples
from melinoe.errors import DataError, TokenizerError


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def test_each_form_becomes_prompt_and_completion(tmp_path, tokenizer):
    """Text is all completion but its first token; the other forms split where they say."""
    path = write(
        tmp_path / "rows.jsonl",
        {"text": "abc"},
        {"prompt": "p", "completion": "c"},
        {"question": "2+2?", "answer": "So\n#### 4", "extra": 1},
    )
    text, pair, question = encode(load_examples(path), tokenizer, 99)
    assert split_text(text, tokenizer) == ("a", "bc<eos>")
    assert split_text(pair, tokenizer) == ("p", "c<eos>")
    assert split_text(question, tokenizer) == ("Question: 2+2?\nAnswer:", " So\n#### 4<eos>")


def test_every_assistant_turn_of_a_chat_is_completion(tmp_path, tokenizer):
    """The template's own words around a turn belong to the prompt, its ending to the turn."""
    turns = [("user", "hi"), ("assistant", "yo"), ("user", "bye"), ("assistant", "ok")]
    chat = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (example,) = load_examples(write(tmp_path / "c.jsonl", chat))
    (encoded,) = encode([example], tokenizer, 99)
    assert split_text(encoded, tokenizer) == ("<u>hi</><a><u>bye</><a>", "yo</>ok</>")
    assert tokenizer.decode(encoded.input_ids) == "<u>hi</><a>yo</><u>bye</><a>ok</>"
    prompt = tokenizer.decode(encode_prompts([example], tokenizer)[0])
    assert prompt == "<u>hi</><a>yo</><u>bye</><a>"


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path, tokenizer):
    """Where turns cannot be told apart the message says what to give instead."""
    turns = [{"role": r, "content": "x"} for r in ("user", "assistant", "user", "assistant")]
    (example,) = load_examples(write(tmp_path / "c.jsonl", {"messages": turns}))
    template, tokenizer.chat_template = tokenizer.chat_template, "{{ messages | length }}"
    try:
        with pytest.raises(DataError, match=r"c\.jsonl:1 .*prompt and completion"):
            encode([example], tokenizer, 99)
        tokenizer.chat_template = None
        with pytest.raises(TokenizerError, match="no chat template"):
            encode([example], tokenizer, 99)
    finally:
        tokenizer.chat_template = template


@pytest.mark.parametrize(
    "row",
    [
        "",
        "not json",
        "[1]",
        '"text"',
        {},
        {"prompt": "alone"},
        {"text": ""},
        {"text": 5},
        {"prompt": "p", "completion": "  "},
        {"question": "", "answer": "4"},
        {"messages": []},
        {"messages": "hi"},
        {"messages": [{"role": "user", "content": "hi"}]},
        {"messages": [{"role": "assistant"}]},
        {"prompt": [{"role": "user", "content": "hi"}], "completion": "yo"},
        {"prompt": [{"role": "user", "content": "hi"}], "completion": []},
        {"conversations": [{"from": "human", "value": "hi"}]},
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, row):
    """The second of three rows is bad: the message says so, in one line."""
    path = write(tmp_path / "rows.jsonl", {"text": "good"}, row, {"text": "good"})
    with pytest.raises(DataError) as raised:
        load_examples(path)
    assert f"{path}:2" in str(raised.value) and "\n" not in str(raised.value)


def test_nothing_to_read_is_an_error(tmp_path):
    """No file, an empty one, a directory without data, bytes that are no text."""
    with pytest.raises(DataError, match="does not exist"):
        load_examples(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match="has no rows"):
        load_examples(write(tmp_path / "empty.jsonl"))
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"no \.jsonl, "):
        load_examples(tmp_path / "none")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        load_examples(tmp_path / "binary.jsonl")


def test_a_hub_name_that_cannot_be_had_is_one_sentence():
    """Offline and unknown: the library's error becomes ours."""
    with pytest.raises(DataError, match="no file and no hub data set"):
        load_examples("nobody/no-such-data-set")


def test_limit_and_directories_read_in_order(tmp_path):
    """Files of a directory come by name; the limit counts rows over all of them."""
    write(tmp_path / "b.jsonl", {"text": "3"})
    write(tmp_path / "a.jsonl", {"text": "1"}, {"text": "2"})
    assert [one.completion for one in load_examples(tmp_path)] == ["1", "2", "3"]
    assert [one.completion for one in load_examples(tmp_path, limit=2)] == ["1", "2"]


def test_long_completions_are_cut_and_full_prompts_dropped(tmp_path, tokenizer, caplog):
    """At 4 tokens: "ab"+"cdef" keeps c and d; a prompt of 4 leaves no room and goes, counted."""
    path = write(
        tmp_path / "r.jsonl",
        {"prompt": "ab", "completion": "cdef"},
        {"prompt": "abcd", "completion": "e"},
    )
    (kept,) = encode(load_examples(path), tokenizer, 4)
    assert split_text(kept, tokenizer) == ("ab", "cd")
    assert (
        "1 were cut at 4 tokens (3 tokens fell away); 1 left out (no completion token"
        in caplog.text
    )
    with pytest.raises(DataError, match="raise max_length"):
        encode(load_examples(path), tokenizer, 2)


def test_padding_is_masked_in_attention_and_labels():
    """Two examples of lengths 3 and 1, worked by hand."""
    batch = Collator(9)([Encoded([5, 6, 7], [False, True, True]), Encoded([8], [False])])
    assert torch.equal(batch["input_ids"], torch.tensor([[5, 6, 7], [8, 9, 9]]))
    assert torch.equal(batch["attention_mask"], torch.tensor([[1, 1, 1], [1, 0, 0]]))
    assert torch.equal(batch["labels"], torch.tensor([[-100, 6, 7], [-100, -100, -100]]))


def test_a_conversational_prompt_and_completion_learns_the_completion_alone(tmp_path, tokenizer):
    """TRL's lists of turns: an assistant turn of the prompt is context."""
    turns = [("user", "hi"), ("assistant", "yo"), ("user", "bye"), ("assistant", "ok")]
    messages = [{"role": role, "content": content} for role, content in turns]
    row = {"prompt": messages[:3], "completion": messages[3:]}
    (example,) = load_examples(write(tmp_path / "c.jsonl", row))
    (encoded,) = encode([example], tokenizer, 99)
    assert split_text(encoded, tokenizer) == ("<u>hi</><a>yo</><u>bye</><a>", "ok</>")
    prompt = tokenizer.decode(encode_prompts([example], tokenizer)[0])
    assert prompt == "<u>hi</><a>yo</><u>bye</><a>"


def test_sharegpt_conversations_read_as_messages(tmp_path, tokenizer):
    """`from` human and gpt are user and assistant, as in TRL."""
    spoken = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
    (example,) = load_examples(write(tmp_path / "c.jsonl", {"conversations": spoken}))
    (encoded,) = encode([example], tokenizer, 99)
    assert split_text(encoded, tokenizer) == ("<u>hi</><a>", "yo</>")


def test_tools_reach_the_chat_template_and_calls_need_no_content(tmp_path, tokenizer):
    """A turn may call a function instead of speaking; nulls that fill a column are as absent."""
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "hi", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    row = {"messages": messages, "tools": [{"name": "add"}]}
    (example,) = load_examples(write(tmp_path / "c.jsonl", row))
    template, tokenizer.chat_template = (
        tokenizer.chat_template,
        (
            "{% for t in tools %}[{{ t.name }}]{% endfor %}{% for m in messages %}<{{ m.role[0] }}>"
            "{{ m.content if m.content is defined else m.tool_calls[0].function.name }}</>"
            "{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
        ),
    )
    try:
        (encoded,) = encode([example], tokenizer, 99)
    finally:
        tokenizer.chat_template = template
    assert split_text(encoded, tokenizer) == ("[add]<u>hi</><a>", "add</>")


def test_a_batch_is_padded_on_the_right_and_learns_completions_alone():
    """Two examples worked by hand."""
    batch = Collator(9)([Encoded([5, 6, 7], [False, True, True]), Encoded([8], [False])])
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 9, 9]],
        "labels": [[-100, 6, 7], [-100, -100, -100]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
    }
