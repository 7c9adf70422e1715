"""Traces as tables, CSV and Parquet."""

from pathlib import Path

import numpy as np
import pytest
from foreign_files import CSV, same, sample, write_table
from pyarrow import csv, parquet

from melinoe.errors import TraceError
from melinoe.foreign import read_foreign


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_table_holds_a_trace(tmp_path, suffix):
    """Written and read again, everything is there."""
    path = tmp_path / f"t{suffix}"
    write_table(sample(), path)
    found = read_foreign(path, num_experts=6)
    assert same(found.trace, sample())


def test_a_table_by_hand_needs_no_passes(tmp_path):
    """Prompts are one pass, completions one each; words and numbers for kinds, empty for none."""
    path = tmp_path / "t.csv"
    path.write_text(CSV)
    trace = read_foreign(path, num_experts=6).trace
    assert trace.forward.tolist() == [0, 0, 1, 2, 3, 4]
    assert trace.kind.tolist() == [0, 0, 1, 0, 1, 1]
    assert trace.experts[0].tolist() == [[3, 1], [2, -1]]
    assert trace.experts[2].tolist() == [[3, -1], [4, 5]]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda csv: csv.replace("layer", "floor"), "no column layer, but token, floor"),
        (lambda csv: csv.replace("expert_", "e"), "no column expert, but token"),
        (lambda csv: csv.replace("expert_1", "expert_2"), "expert_1"),
        (lambda csv: csv.replace("0,0,0,prompt,3", "0,0,0,prompt,9"), "row 1 has the value 9"),
        (lambda csv: csv.replace("0,0,0,prompt,3", "0,0,0,prompt,x"), "row 1 has the value 'x'"),
        (lambda csv: csv.replace("0,0,0,prompt,3", "0,0,0,prompt,1.5"), "row 1 has the value 1.5"),
        (lambda csv: csv.replace("0,0,0,prompt,3", "0,0,0,story,3"), "row 1 has the kind 'story'"),
        (lambda csv: csv[: csv.rindex("8,1")], "row 11 has not every layer"),
        (lambda csv: csv.replace("1,0,0,prompt,0,1\n", ""), "row 3 has not every layer"),
        (lambda csv: csv.replace("0,1,0,prompt", "0,1,1,prompt"), "row 2 has another sequence"),
        (lambda csv: csv.replace("2,0,0,completion,3,-1", "2,0,0,completion,3,3"), "row 5 chooses"),
        (lambda csv: csv.splitlines()[0] + "\n", "no rows"),
        (lambda csv: "", "cannot be read"),
    ],
)
def test_a_table_of_another_form_is_refused(tmp_path, change, text):
    """One sentence: what is wrong, in which row."""
    path = tmp_path / "t.csv"
    path.write_text(change(CSV))
    with pytest.raises(TraceError, match=text):
        read_foreign(path, num_experts=6)


def test_rows_in_any_order_make_the_same_trace(tmp_path):
    """Token and layer number the rows, so layer by layer or backwards is the same trace."""
    head, *rows = CSV.splitlines()
    path = tmp_path / "t.csv"
    path.write_text(CSV)
    want = read_foreign(path, num_experts=6).trace
    for other in (rows[::-1], sorted(rows, key=lambda row: row.split(",")[1])):
        path.write_text("\n".join([head, *other]))
        found = read_foreign(path, num_experts=6).trace
        assert np.array_equal(found.experts, want.experts)
        assert np.array_equal(found.kind, want.kind)


def test_what_is_left_out_is_said(tmp_path):
    """A column of another kind, gaps in the layers."""
    path = tmp_path / "t.csv"
    path.write_text("token,layer,sequence,kind,expert_0,mood\n0,3,7,1,2,x\n1,3,7,1,0,y\n")
    found = read_foreign(path, num_experts=4)
    assert found.notes == ["columns left out: mood", "layers 3 are numbered from 0, without gaps"]
    assert found.trace.experts.tolist() == [[[2]], [[0]]] and found.trace.num_sequences == 1
    assert all(note in found.trace.note for note in found.notes)


def test_a_table_must_be_told_its_experts(tmp_path):
    """Nobody can see in it the experts that were never chosen."""
    path = tmp_path / "t.csv"
    path.write_text(CSV)
    with pytest.raises(TraceError, match="--num-experts"):
        read_foreign(path)


def example_of_the_docs(first_column):
    """The block of docs/traces.md whose header begins so."""
    text = (Path(__file__).parents[2] / "docs" / "traces.md").read_text()
    blocks = [block.split("```")[0] for block in text.split("```csv\n")[1:]]
    (found,) = [block for block in blocks if block.startswith(first_column)]
    return found


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_the_docs_example_of_a_trace_is_one(tmp_path, suffix):
    """A prompt of two tokens and one token more, two layers, top-2 of 4, as either kind of file."""
    path = tmp_path / "t.csv"
    path.write_text(example_of_the_docs("token"))
    if suffix == ".parquet":
        path = tmp_path / "t.parquet"
        parquet.write_table(csv.read_csv(tmp_path / "t.csv"), path)
    trace = read_foreign(path, num_experts=4).trace
    assert trace.experts.tolist() == [[[3, 1], [0, 2]], [[3, 0], [2, 1]], [[1, 3], [2, -1]]]
    assert trace.kind.tolist() == [0, 0, 1] and trace.forward.tolist() == [0, 0, 1]
    assert trace.sequence.tolist() == [0, 0, 0]
