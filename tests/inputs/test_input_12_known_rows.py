"""Rows as public data sets have them: Dolly, Alpaca, content parts, and files of other kinds."""

import csv
import gzip
import json

import pytest
from data_rows import byte_tokenizer, learned, turns, write

from melinoe.data import load_examples
from melinoe.errors import DataError

HEAD = "Below is an instruction that describes a task"
WITH = ", paired with an input that provides further context"
TAIL = (
    ". Write a response that appropriately completes the request.\n\n### Instruction:\nSum up.\n\n"
)
CHAT = turns(("user", "hi"), ("assistant", "yo"))


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"context": "a b", "response": "c", "category": "x"}, f"{WITH}{TAIL}### Input:\na b\n\n"),
        ({"context": "", "response": "c"}, TAIL),
        ({"context": None, "response": "c"}, TAIL),
        ({"response": "c"}, TAIL),
        ({"input": "a b", "output": "c"}, f"{WITH}{TAIL}### Input:\na b\n\n"),
        ({"input": "", "output": "c"}, TAIL),
        ({"output": "c", "text": "all of it"}, TAIL),
    ],
)
def test_instruction_rows_get_alpacas_prompt(tmp_path, row, prompt):
    """Dolly's context and Alpaca's input are the same; both may be missing."""
    path = write(tmp_path / "rows.jsonl", {"instruction": "Sum up.", **row})
    before, after = learned(path, byte_tokenizer())
    assert before == f"{HEAD}{prompt}### Response:\n"
    assert after == "c<eos>"


@pytest.mark.parametrize(
    "parts",
    [
        [{"type": "text", "text": "y"}, {"type": "text", "text": "o"}],
        [{"type": "text", "text": "yo", "image_url": None}],
        [{"text": "yo"}],
        ["y", "o"],
    ],
)
def test_text_parts_are_one_text(tmp_path, parts):
    """As templates that know parts write them: one after the other."""
    chat = [
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {**CHAT[1], "content": parts},
    ]
    path = write(tmp_path / "rows.jsonl", {"messages": chat})
    assert learned(path, byte_tokenizer()) == ("<u>hi</><a>", "yo</>")


@pytest.mark.parametrize("kind", ["image", "image_url", "input_audio", "video", "thinking"])
def test_parts_that_are_no_text_are_refused_by_name(tmp_path, kind):
    """A model of text cannot read them, and without them the answer is to something else."""
    chat = [
        {"role": "user", "content": [{"type": kind, kind: "x"}, {"type": "text", "text": "hi"}]}
    ]
    path = write(tmp_path / "rows.jsonl", {"messages": [*chat, CHAT[1]]})
    with pytest.raises(
        DataError, match=rf"rows\.jsonl:1 has .* turn 0 with content of type '{kind}'"
    ):
        load_examples(path)


@pytest.mark.parametrize(
    ("speaker", "role"),
    [
        ("human", "user"), ("user", "user"), ("gpt", "assistant"), ("assistant", "assistant"),
        ("chatgpt", "assistant"), ("bing", "assistant"), ("bard", "assistant"),
        ("system", "system"), ("tool", "tool"), ("observation", "tool"),
        ("function_response", "tool"),
    ],
)  # fmt: skip
def test_sharegpts_speakers_have_roles(tmp_path, speaker, role):
    """Each spelling that is about; `from` with `content`, and `role` with `value`, are read too."""
    rows = [
        {"conversations": [{"from": speaker, "value": "x"}, CHAT[1]]},
        {"conversations": [{"from": speaker, "content": "x"}, {"role": "gpt", "value": "yo"}]},
    ]
    for example in load_examples(write(tmp_path / "rows.jsonl", *rows)):
        assert list(example.messages) == [{"role": role, "content": "x"}, CHAT[1]]


@pytest.mark.parametrize("speaker", ["function_call", "narrator", 7])
def test_a_speaker_without_a_role_is_refused(tmp_path, speaker):
    """A template would write it as it is, and the model read what it never saw."""
    row = {"conversations": [{"from": speaker, "value": "x"}, CHAT[1]]}
    with pytest.raises(DataError, match=f"turn 0 from {speaker!r}; name one of user, assistant"):
        load_examples(write(tmp_path / "rows.jsonl", row))


ROWS = [{"prompt": "a, b", "completion": "c\nd"}, {"prompt": "e", "completion": 'f "g"'}]


def write_as(path):
    name = path.name
    if name.endswith(".parquet"):
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist([*ROWS]), path)
        return path
    opened = gzip.open if name.endswith(".gz") else open
    with opened(path, "wt", encoding="utf-8", newline="") as file:
        if ".csv" in name:
            table = csv.DictWriter(file, ["prompt", "completion"])
            table.writeheader()
            table.writerows(ROWS)
        else:
            file.write("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


NAMES = ["r.jsonl", "r.json", "r.csv", "r.parquet", "r.jsonl.gz", "r.json.gz", "r.csv.gz"]


@pytest.mark.parametrize("name", NAMES)
def test_files_of_every_kind_hold_the_same_rows(tmp_path, name):
    """Each row knows where it stands; the file alone, and the directory that it is in."""
    path = write_as(tmp_path / name)
    for place in (path, tmp_path):
        examples = load_examples(place)
        assert [{"prompt": e.prompt, "completion": e.completion} for e in examples] == ROWS
        assert all(e.source.startswith(f"{path}") for e in examples)


def test_a_cell_of_a_csv_file_is_as_long_as_its_text(tmp_path):
    """Python's own reader stops at 131,072 characters unless told otherwise."""
    text = "a b " * 50_000
    (tmp_path / "r.csv").write_text(f"prompt,completion\na,{text}\n")
    assert load_examples(tmp_path / "r.csv")[0].completion == text


def test_parquet_keeps_turns_and_their_nulls_out(tmp_path):
    """Arrow gives every turn the keys of all: what was absent is absent again."""
    import pyarrow as pa
    from pyarrow import parquet

    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    other = {"function": {"name": "sub", "arguments": {"b": 2}}}
    rows = [
        {"messages": [CHAT[0], {"role": "assistant", "tool_calls": [call, other]}], "tools": None},
        {"messages": CHAT, "tools": [{"name": "add"}]},
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "r.parquet")
    first, second = load_examples(tmp_path / "r.parquet")
    assert list(first.messages) == rows[0]["messages"]
    assert list(second.messages) == CHAT
    assert second.template == {"tools": [{"name": "add"}]} and first.template == {}


def test_a_directory_says_what_it_leaves_out(tmp_path, caplog):
    """Files of other kinds are named once; what `datasets` writes beside its data is no data."""
    write_as(tmp_path / "r.csv")
    for name in ("notes.txt", "dataset_info.json", ".hidden.jsonl"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "more").mkdir()
    assert len(load_examples(tmp_path)) == 2
    assert f"not read in {tmp_path}: dataset_info.json, more, notes.txt" in caplog.text


# The time of compressing would stand in it, and in the test's name.
_CUT = gzip.compress(b'{"text": "a"}' * 99, mtime=0)[:-20]


@pytest.mark.parametrize(
    ("name", "blob", "words"),
    [
        ("r.parquet", b"PAR1", "cannot be read"),
        ("r.parquet", b"", "cannot be read"),
        ("r.jsonl.gz", b"no gzip", "cannot be read"),
        ("r.jsonl.gz", _CUT, "cannot be read|is not JSON"),
        ("r.csv", b"prompt,completion\na\n", ":2 has 1 cells and the header 2"),
        ("r.csv", b"prompt,completion\na,b,c\n", ":2 has 3 cells"),
        ("r.csv", b'prompt,completion\n"a,b\n', "is not CSV"),
        ("r.csv", b"text,text\na,b\n", "names a column twice"),
        ("r.csv", b"prompt;completion\na;b\n", "prompt;completion"),
        ("r.csv", b"", "has no rows"),
    ],
)
def test_a_damaged_file_is_one_sentence(tmp_path, name, blob, words):
    """With the file's name, and no row made up of what is left."""
    (tmp_path / name).write_bytes(blob)
    with pytest.raises(DataError, match=words) as raised:
        load_examples(tmp_path / name)
    assert str(tmp_path / name) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ("prompt=q,completion=a", None),
        ({"prompt": "q", "completion": "a"}, None),
        ("prompt=q,completion=b", "has no column 'b'"),
        ("prompt=q,answer=a", "has the keys"),
        ("prompt=q,reply=a", "'reply' is no key that a row is read by"),
        ("prompt", "not of the form"),
        ("prompt=q,prompt=a", "not of the form"),
        ("", "not of the form"),
    ],
)
def test_columns_have_the_names_that_they_are_given(tmp_path, caplog, columns, words):
    """The row's own text is passed over, as was asked for, and said."""
    path = write(tmp_path / "r.jsonl", {"q": "2+2?", "a": "4", "text": "x", "weight": 0})
    if words is None:
        assert learned(path, byte_tokenizer(), columns=columns) == ("2+2?", "4<eos>")
        assert "ignored columns: text (in 1), weight (in 1)" in caplog.text
    else:
        with pytest.raises(DataError, match=words):
            load_examples(path, columns=columns)


def test_a_row_of_no_form_names_the_way(tmp_path):
    """What the row has, what is read, and how to say which column is which."""
    path = write(tmp_path / "r.jsonl", {"input_text": "a", "target": "b"})
    with pytest.raises(DataError, match=r"\['input_text', 'target'\].*--columns prompt=NAME"):
        load_examples(path)
