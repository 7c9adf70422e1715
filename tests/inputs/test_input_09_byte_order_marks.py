"""Byte-order marks, line ends, blank lines, lists of rows: as editors and exports write them."""

import gzip
import json

import pytest

from melinoe.data import load_examples
from melinoe.errors import DataError

ROWS = [{"text": "a ä"}, {"text": "b"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
SPELLINGS = {
    "plain": LINES.encode(),
    "byte-order mark": LINES.encode("utf-8-sig"),
    "CRLF": LINES.replace("\n", "\r\n").encode(),
    "CRLF and a mark": LINES.replace("\n", "\r\n").encode("utf-8-sig"),
    "no last line end": LINES.rstrip("\n").encode(),
    "blank last line": (LINES + "\n").encode(),
    "blank last lines": (LINES + "\n  \r\n\n").encode(),
    "a list": json.dumps(ROWS).encode(),
    "a list over lines": json.dumps(ROWS, indent=1).encode("utf-8-sig"),
    "a list after a blank line": ("\n" + json.dumps(ROWS)).encode(),
}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.txt", "rows.jsonl.gz"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_same_rows_are_read(tmp_path, spelling, name):
    """Whatever an editor did to the file's bytes."""
    path = tmp_path / name
    blob = SPELLINGS[spelling]
    path.write_bytes(gzip.compress(blob) if name.endswith(".gz") else blob)
    assert [one.completion for one in load_examples(path)] == ["a ä", "b"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"text": "a"},\n{"text": "b"}\n', ":1 is not JSON .*no comma after it"),
        ('{"text": "a",}\n', ":1 is not JSON .*one object per line"),
        ('[{"text": "a"},]', "is not JSON .*one list of objects"),
        ('{\n "text": "a"\n}\n', ":1 is not JSON"),
        ('{"text": "a"}\n\n{"text": "b"}\n', ":2 is empty"),
        ('{"text": "a", "text": "b"}\n', ":1 is not JSON .*text stands twice"),
        ('{"text": ' + "9" * 5000 + "}\n", ":1 is not JSON"),
        ('{"text": ' + "[" * 100_000 + "}\n", ":1 is not JSON"),
        ("", "has no rows"),
        ("\n \n", "has no rows"),
        ("[]", "has no rows"),
        ("[1]", r"\[0\] is not an object"),
    ],
)
def test_what_is_no_json_says_where_and_what_to_write(tmp_path, text, words):
    """One sentence, with file and line."""
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=rf"rows\.jsonl.*{words}|{words}") as raised:
        load_examples(path)
    assert "rows.jsonl" in str(raised.value) and "\n" not in str(raised.value)
