"""Arguments of calls as an object and as JSON, under templates that take the one or the other."""

import json

import pytest
from chat_templates import JOINING, PRINTING, QWEN3, WALKING
from data_rows import byte_tokenizer, learned, write

from melinoe.data import load_examples
from melinoe.errors import DataError

OBJECT = {"a": 1, "b": "x"}
TEXT = '{"a": 1, "b": "x"}'


def chat(arguments, **call):
    called = {"type": "function", "function": {"name": "add", "arguments": arguments}, **call}
    return [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [called]},
    ]


@pytest.mark.parametrize("arguments", [OBJECT, TEXT], ids=["object", "JSON"])
@pytest.mark.parametrize(
    ("template", "written"),
    [
        (WALKING, "add(a=1;b=x;)</>"),
        (JOINING, f"add({TEXT})</>"),
        (PRINTING, f"add({TEXT})</>"),
        (
            QWEN3,
            '<think>\n\n</think>\n\n<tool_call>\n{"name": "add", "arguments": '
            f"{TEXT}}}\n</tool_call><|im_end|>\n",
        ),
    ],
    ids=["walks", "joins", "prints", "takes both"],
)
def test_every_template_gets_arguments_that_it_can_write(tmp_path, template, written, arguments):
    """Both spellings give one text, worked out by hand."""
    path = write(tmp_path / "calls.jsonl", {"messages": chat(arguments)})
    assert learned(path, byte_tokenizer(template))[1] == written


def test_calls_as_json_are_read(tmp_path):
    """A column of strings holds the whole list; a call without `function` is one too."""
    row = {"messages": chat(TEXT)}
    row["messages"][1]["tool_calls"] = json.dumps(row["messages"][1]["tool_calls"])
    path = write(tmp_path / "calls.jsonl", row)
    assert learned(path, byte_tokenizer(WALKING))[1] == "add(a=1;b=x;)</>"


def test_arguments_keep_nulls_in_json_alone(tmp_path):
    """Arrow fills objects with nulls, so there they are absent; in JSON somebody wrote them."""
    given = chat({"a": 1, "b": None})
    path = write(tmp_path / "calls.jsonl", {"messages": given})
    assert learned(path, byte_tokenizer(WALKING))[1] == "add(a=1;)</>"
    path = write(tmp_path / "calls.jsonl", {"messages": chat('{"a": 1, "b": null}')})
    assert learned(path, byte_tokenizer(WALKING))[1] == "add(a=1;b=None;)</>"


@pytest.mark.parametrize("arguments", ["a, b", "[1]"])
def test_arguments_that_are_no_object_stay_as_they_are(tmp_path, arguments):
    """A template that joins strings writes them; one that walks them refuses, by file and row."""
    path = write(tmp_path / "calls.jsonl", {"messages": chat(arguments)})
    assert learned(path, byte_tokenizer(JOINING))[1] == f"add({arguments})</>"
    with pytest.raises(DataError, match=r"calls\.jsonl:1 is a chat that the chat template refuses"):
        learned(path, byte_tokenizer(WALKING))


@pytest.mark.parametrize("calls", ["add", {"name": "add"}, ["add"], 7])
def test_calls_that_are_no_list_of_objects_are_refused(tmp_path, calls):
    """By file, row, column and turn."""
    given = chat(OBJECT)
    given[1]["tool_calls"] = calls
    path = write(tmp_path / "calls.jsonl", {"messages": given})
    with pytest.raises(DataError, match=r'calls\.jsonl:1 has in "messages" a turn 1 with "tool_'):
        load_examples(path)


@pytest.mark.parametrize("calls", [None, [], "[]"])
def test_no_calls_are_no_calls(tmp_path, calls):
    """Then the turn has to say something."""
    given = chat(OBJECT)
    given[1]["tool_calls"] = calls
    path = write(tmp_path / "calls.jsonl", {"messages": given})
    with pytest.raises(DataError, match='turn 1 without a "content"'):
        load_examples(path)
    given[1]["content"] = "yo"
    path = write(tmp_path / "calls.jsonl", {"messages": given})
    assert learned(path, byte_tokenizer())[1] == "yo</>"
