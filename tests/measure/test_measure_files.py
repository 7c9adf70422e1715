"""Records to files: whole lines, whole files, or nothing."""

import errno
import json
import math
import os

import pytest

from melinoe.errors import DataError
from melinoe.measure import (
    append_jsonl,
    write_json,
)


def test_lines_are_appended_whole(tmp_path):
    """Two records are two lines, the folder is made, and letters stay letters."""
    path = tmp_path / "runs" / "runs.jsonl"
    append_jsonl(path, {"kind": "serve", "model": "Μηλινόη"})
    append_jsonl(path, {"kind": "quality"})
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"kind": "serve", "model": "Μηλινόη"},
        {"kind": "quality"},
    ]
    assert "Μηλινόη" in lines[0]


def test_a_line_that_the_disk_holds_half_of_is_taken_back(tmp_path, monkeypatch):
    """The system may write a part and say so; the next part finds the disk full."""
    path = tmp_path / "runs.jsonl"
    append_jsonl(path, {"kind": "serve"})
    write, calls = os.write, []

    def some(handle, data):
        calls.append(len(data))
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(handle, data[:5])

    monkeypatch.setattr(os, "write", some)
    with pytest.raises(DataError, match="No space left"):
        append_jsonl(path, {"kind": "quality"})
    monkeypatch.undo()
    append_jsonl(path, {"kind": "curve"})
    lines = path.read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["serve", "curve"]


def test_a_number_that_is_not_finite_leaves_the_file_as_it_was(tmp_path):
    """JSON has no nan: the earlier result stays, and nothing lies beside it."""
    path = tmp_path / "result.json"
    write_json(path, {"value": 1})
    for write in (write_json, append_jsonl):
        with pytest.raises(DataError, match="not finite"):
            write(path, {"value": math.nan})
    assert json.loads(path.read_text()) == {"value": 1}
    assert [found.name for found in tmp_path.iterdir()] == ["result.json"]


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    """A file where a folder should be."""
    (tmp_path / "taken").write_text("")
    for write in (write_json, append_jsonl):
        with pytest.raises(DataError, match="cannot write"):
            write(tmp_path / "taken" / "result.json", {"value": 1})
