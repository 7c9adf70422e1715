"""The long form, a row for each choice: token, layer, expert."""

import pytest
from data_rows import write
from pyarrow import csv, parquet

from melinoe.errors import TraceError
from melinoe.foreign import read_foreign

LONG = "token,layer,expert\n0,0,3\n0,0,1\n0,1,2\n0,1,0\n1,0,3\n1,0,0\n1,1,1\n1,1,2\n"
WANT = [[[3, 1], [2, 0]], [[3, 0], [1, 2]]]


def as_file(path, text):
    """The same table as CSV, Parquet or JSON lines."""
    table = path.with_suffix(".csv")
    table.write_text(text)
    if path.suffix == ".parquet":
        parquet.write_table(csv.read_csv(table), path)
    elif path.suffix == ".jsonl":
        rows = csv.read_csv(table).to_pylist()
        write(path, *rows)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_a_row_for_each_choice_is_a_trace(tmp_path, suffix):
    """Choices of one token and layer come together in their order."""
    found = read_foreign(as_file(tmp_path / f"t{suffix}", LONG), num_experts=4)
    assert found.trace.experts.tolist() == WANT
    assert found.trace.kind.tolist() == [1, 1]
    assert len(found.notes) == 2  # one sequence, all completions


@pytest.mark.parametrize(
    "head",
    ["token_idx,layer_id,expert_id", "Token Index,Layer_Idx,Expert_Idx", "position,layer,expert"],
)
def test_common_spellings_are_known(tmp_path, head):
    """Columns by what public tools call them."""
    path = as_file(tmp_path / "t.csv", LONG.replace("token,layer,expert", head))
    assert read_foreign(path, num_experts=4).trace.experts.tolist() == WANT


def test_ranks_and_sequences_come_along(tmp_path):
    """Ranks order the choices, wherever their rows stand; numbers may begin anew by sequence."""
    rows = ["req_id,token,layer,rank,expert,weight"]
    for rank in (1, 0):
        for name in ("b", "a"):
            rows += [f"{name},{token},0,{rank},{2 * rank + token},0.{5 - rank}" for token in (0, 1)]
    found = read_foreign(as_file(tmp_path / "t.csv", "\n".join(rows) + "\n"), num_experts=4)
    assert found.trace.experts[:, 0].tolist() == [[0, 2], [1, 3]] * 2
    assert found.trace.sequence.tolist() == [0, 0, 1, 1]
    assert found.notes[0] == "columns left out: weight"


def test_a_skipped_choice_is_none(tmp_path):
    """A token with fewer rows chose fewer experts."""
    path = as_file(tmp_path / "t.csv", LONG.replace("1,1,2\n", ""))
    assert read_foreign(path, num_experts=4).trace.experts[1, 1].tolist() == [1, -1]


def test_kinds_and_passes_are_taken_where_they_are_told(tmp_path):
    """prefill and decode are words for it too."""
    head, *rows = LONG.splitlines()
    lines = [f"{head},phase,step"]
    lines += [f"{row},{'prefill' if row[0] == '0' else 'decode'},{row[0]}" for row in rows]
    found = read_foreign(as_file(tmp_path / "t.csv", "\n".join(lines)), num_experts=4)
    assert found.trace.kind.tolist() == [0, 1] and found.trace.forward.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LONG + "0,0,2\n", "same layer twice|not every layer|mix several"),
        (LONG.replace("0,1,2\n0,1,0\n", ""), "not every layer"),
        (LONG.replace("0,0,1\n", "0,0,3\n"), "chooses an expert twice"),
        ("layer,expert\n0,1\n", "no column token"),
        ("token,expert\n0,1\n", "no column layer"),
    ],
)
def test_a_long_table_that_says_no_order_is_refused(tmp_path, text, words):
    """One sentence, with a way that works."""
    with pytest.raises(TraceError, match=words):
        read_foreign(as_file(tmp_path / "t.csv", text), num_experts=4)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b"token,layer,\xc3expert\n0,0,1\n"),
        ("b.jsonl", b'{"token": 0, "expert": 1, "layer": null}\n'),
        ("c.jsonl", b'{"token": 0, "expert": 1, "layer": 0, "kind": [1]}\n'),
        ("d.jsonl", b'{"token": 0, "expert": 1, "layer": 0, "req_id": {"a": 1}}\n'),
        ("e.jsonl", b"[1, 2]\n"),
        ("f.jsonl", b""),
        ("g.parquet", b"PAR1"),
        ("h.csv.gz", b"\x1f\x8b\x08"),
        ("i.pt", b"\x80\x02]q\x00."),
    ],
)
def test_whatever_bytes_a_file_holds_it_is_refused_in_a_sentence(tmp_path, name, content):
    """Found by changing files at random: no traceback."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TraceError, match=name):
        read_foreign(tmp_path / name, num_experts=4)
