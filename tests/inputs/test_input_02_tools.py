"""Tools, and whatever else stands beside a chat: read, refused or counted, never dropped."""

import json

import pytest
from data_rows import byte_tokenizer, learned, turns, write

from melinoe.data import load_examples
from melinoe.errors import DataError

CHAT = turns(("user", "hi"), ("assistant", "yo"))
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"a": "int"}}}]
SHOWING = (
    "{% for t in tools or [] %}[{{ t | tojson }}]{% endfor %}"
    "{% for d in documents or [] %}({{ d.title }}){% endfor %}"
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.mark.parametrize(
    "tools",
    [
        TOOLS,
        json.dumps(TOOLS),
        [json.dumps(TOOLS[0])],
        [{**TOOLS[0], "strict": None}],  # Arrow's filling
    ],
    ids=["list", "JSON", "list of JSON", "with nulls"],
)
@pytest.mark.parametrize("form", ["messages", "conversations", "prompt", "prompt alone"])
def test_tools_reach_the_template_in_every_spelling(tmp_path, tools, form):
    """A list, its JSON, and lists of JSON are one; in each conversational form."""
    rows = {
        "messages": {"messages": CHAT},
        "conversations": {"conversations": [{"from": "human", "value": "hi"}, CHAT[1]]},
        "prompt": {"prompt": CHAT[:1], "completion": CHAT[1:]},
        "prompt alone": {"prompt": CHAT[:1]},
    }
    path = write(tmp_path / "t.jsonl", {**rows[form], "tools": tools})
    (example,) = load_examples(path, prompts=True)
    assert example.template == {"tools": TOOLS}
    if form != "prompt alone":
        before, after = learned(path, byte_tokenizer(SHOWING))
        assert after == "yo</>"
        assert before == f"[{json.dumps(TOOLS[0])}]<u>hi</><a>"


@pytest.mark.parametrize(
    ("tools", "words"),
    [
        ("add", '"tools" that are no list of objects'),
        ("{", '"tools" that are no list of objects'),
        (7, '"tools" that are no list of objects'),
        ({"name": "add"}, '"tools" that are no list of objects'),
        (["add"], '"tools" that are no list of objects'),
    ],
)
def test_tools_that_cannot_be_read_are_refused(tmp_path, tools, words):
    """One sentence that names the row and the column."""
    with pytest.raises(DataError, match=words):
        load_examples(write(tmp_path / "t.jsonl", {"messages": CHAT, "tools": tools}))


@pytest.mark.parametrize("nothing", [None, [], "[]"])
def test_no_tools_are_no_tools(tmp_path, nothing):
    """A column that is empty in a row says nothing about it."""
    path = write(tmp_path / "t.jsonl", {"messages": CHAT, "tools": nothing})
    assert load_examples(path)[0].template == {}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": CHAT, "tools": TOOLS}, "has tools that the chat template does not write"),
        ({"messages": CHAT, "documents": [{"title": "x"}]}, "has documents that"),
        (
            {"messages": [CHAT[0], {**CHAT[1], "tool_calls": [{"function": {"name": "add"}}]}]},
            "has tool_calls that",
        ),
        (
            {"messages": [{**CHAT[0], "tools": TOOLS}, CHAT[1]]},
            "has tools that the chat template does not write",
        ),
    ],
)
def test_what_a_template_does_not_write_but_must_is_refused(tmp_path, row, words):
    """Under a template without tools the model would learn to call what it was never shown."""
    with pytest.raises(DataError, match=words):
        learned(write(tmp_path / "t.jsonl", row), byte_tokenizer())


def test_documents_and_a_system_column_are_written(tmp_path):
    """Both stand before the chat, where the template and the form put them."""
    row = {"messages": CHAT, "documents": [{"title": "x", "text": None}], "system": "be brief"}
    before, after = learned(write(tmp_path / "t.jsonl", row), byte_tokenizer(SHOWING))
    assert (before, after) == ("(x)<s>be brief</><u>hi</><a>", "yo</>")


PLAIN_ROWS = [
    {"text": "a b"},
    {"prompt": "p", "completion": "c"},
    {"question": "q", "answer": "a"},
    {"instruction": "i", "output": "o"},
]
TELLING = {
    "tools": TOOLS,
    "documents": [{"title": "x"}],
    "chat_template_kwargs": {"x": 1},
    "system": "be brief",
    "system_prompt": "be brief",
    "history": [["a", "b"]],
    "images": ["x.png"],
    "image": "x.png",
    "weight": 0,
    "train": False,
    "mask": [0, 1],
    "completion_mask": [0, 1],
    "assistant_masks": [0, 1],
}


@pytest.mark.parametrize("row", PLAIN_ROWS, ids=lambda row: next(iter(row)))
@pytest.mark.parametrize("key", TELLING)
def test_a_column_that_would_change_the_text_is_refused(tmp_path, row, key):
    """By name, with the way to read the row without it; empty, it is as absent."""
    path = write(tmp_path / "t.jsonl", {**row, key: TELLING[key]})
    with pytest.raises(DataError, match=rf't\.jsonl:1 has a "{key}" .*--columns') as raised:
        load_examples(path)
    named = str(raised.value).partition("--columns ")[2].partition(")")[0]
    assert load_examples(path, columns=named)
    for empty in ("", [], {}, None):
        load_examples(write(tmp_path / "t.jsonl", {**row, key: empty}))


@pytest.mark.parametrize("key", ["images", "weight", "completion_mask", "system_prompt"])
def test_such_a_column_beside_a_chat_is_refused_too(tmp_path, key):
    """Images of a chat cannot be read, and its masks are not ours."""
    with pytest.raises(DataError, match=f'has a "{key}"'):
        load_examples(write(tmp_path / "t.jsonl", {"messages": CHAT, key: TELLING[key]}))


def test_other_columns_are_counted_and_said_once(tmp_path, caplog):
    """Their names and in how many rows; a null does not count, nor does reading again."""
    rows = [{"text": "a", "id": 1}, {"text": "b", "id": 2, "url": "u"}, {"text": "c", "url": None}]
    path = write(tmp_path / "t.jsonl", *rows)
    load_examples(path)
    load_examples(path)
    assert caplog.text.count("3 rows; ignored columns: id (in 2), url (in 1)") == 1


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"training": False}])
def test_a_turn_marked_as_context_is_not_learned(tmp_path, mark):
    """OpenAI's weight and axolotl's train: the turn is shown, and the other learned."""
    chat = [CHAT[0], {**CHAT[1], **mark}, *turns(("user", "bye"), ("assistant", "ok"))]
    before, after = learned(write(tmp_path / "t.jsonl", {"messages": chat}), byte_tokenizer())
    assert (before, after) == ("<u>hi</><a>yo</><u>bye</><a>", "ok</>")


@pytest.mark.parametrize(
    ("chat", "words"),
    [
        ([CHAT[0], {**CHAT[1], "weight": 0.5}], '"weight" of 0.5'),
        ([CHAT[0], {**CHAT[1], "train": "no"}], "\"train\" of 'no'"),
        ([{**CHAT[0], "train": True}, CHAT[1]], "only assistant turns"),
        ([CHAT[0], {**CHAT[1], "weight": 0}], "no assistant turn to learn"),
        ([*turns(("system", "x")), *CHAT], 'a "system" and a system turn'),
    ],
)
def test_marks_that_cannot_be_kept_are_refused(tmp_path, chat, words):
    """Shares of a turn, turns of the user, chats of which nothing is left."""
    row = {"messages": chat} | ({"system": "y"} if len(chat) == 3 else {})
    with pytest.raises(DataError, match=words):
        load_examples(write(tmp_path / "t.jsonl", row))
