"""Traces and statistics as tables, CSV and Parquet."""

from pathlib import Path

import pytest
from foreign_files import CSV, same, sample
from pyarrow import csv, parquet

from melinoe.cache.locality import popularity
from melinoe.errors import TraceError
from melinoe.foreign import read_foreign
from melinoe.foreign.tables import write_table


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("scores", [False, True])
def test_a_table_holds_a_trace(tmp_path, suffix, scores):
    """Written and read again, everything is there, weights too."""
    path = tmp_path / f"t{suffix}"
    write_table(sample(scores), path)
    found = read_foreign(path, num_experts=6)
    assert same(found.trace, sample(scores))
    assert (found.counts == popularity(sample(scores))).all()


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
        (lambda csv: csv.replace("kind", "sort"), "no column kind"),
        (lambda csv: csv.replace("expert_", "e"), "no column expert_0"),
        (lambda csv: csv.replace("expert_1", "expert_2"), "expert_1"),
        (
            lambda csv: csv.replace(",expert_1", ",expert_1,mood").replace(",1\n", ",1,x\n"),
            "mood|Exp",
        ),
        (lambda csv: csv.replace("0,0,0,prompt,3", "0,0,0,prompt,9"), "3|expert ids|0 to 9"),
        (lambda csv: csv.replace("0,0,0,prompt,3", "0,0,0,prompt,x"), "no number"),
        (lambda csv: csv.replace("0,0,0,prompt,3", "0,0,0,prompt,1.5"), "fraction"),
        (lambda csv: csv.replace("0,0,0,prompt,3", "0,0,0,story,3"), "no number"),
        (lambda csv: csv[: csv.rindex("8,1")], "not every layer"),
        (lambda csv: csv.replace("1,0,0,prompt", "1,1,0,prompt"), "layers of each in order"),
        (lambda csv: csv.replace("\n8,", "\n6,"), "do not ascend"),
        (lambda csv: csv.replace("0,1,0,prompt", "0,1,1,prompt"), "differ in sequence"),
        (lambda csv: csv.splitlines()[0] + "\n", "not every layer"),
        (lambda csv: "", "cannot be read"),
    ],
)
def test_a_table_of_another_form_is_refused(tmp_path, change, text):
    """One sentence: what is wrong, and where the form stands."""
    path = tmp_path / "t.csv"
    path.write_text(change(CSV))
    with pytest.raises(TraceError, match=text):
        read_foreign(path, num_experts=6)


def test_a_table_must_be_told_its_experts(tmp_path):
    """Nobody can see in it the experts that were never chosen."""
    path = tmp_path / "t.csv"
    path.write_text(CSV)
    with pytest.raises(TraceError, match="--num-experts"):
        read_foreign(path)
    with pytest.raises(TraceError, match="neither"):
        write_table(sample(), tmp_path / "t.txt")


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


def test_the_docs_example_of_statistics_is_one(tmp_path):
    """Two layers, the first dense; an expert without a row was never chosen."""
    path = tmp_path / "s.csv"
    path.write_text(example_of_the_docs("layer"))
    found = read_foreign(path, num_experts=4)
    assert found.trace is None and found.counts.tolist() == [[20, 0, 4, 0], [1, 7, 7, 9]]


def test_rows_without_counts_are_one_choice_each(tmp_path):
    """A log of choices, in whatever order: each row adds one; SGLang's old names are known."""
    path = tmp_path / "s.csv"
    path.write_text("layer_id,expert_id\n3,0\n1,2\n3,0\n")
    assert read_foreign(path, num_experts=3).counts.tolist() == [[0, 0, 1], [2, 0, 0]]


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("layer,expert\n0,4\n", "expert 4 of 4"),
        ("layer,expert\n0,-1\n", "negative"),
        ("layer,expert,count\n0,1,\n", "negative or missing"),
        ("layer,expert,count\n0,1,x\n", "no whole number"),
        ("layer,expert,count\n0,1,0.5\n", "fraction"),
        ("layer,expert,weight\n0,1,1\n", "weight"),
        ("layer,layer_id,expert\n0,1,1\n", "one twice"),
        ("layer,expert\n", "no rows"),
    ],
)
def test_a_table_of_no_statistics_is_refused(tmp_path, table, words):
    """One sentence: what is wrong, and where the form stands."""
    path = tmp_path / "s.csv"
    path.write_text(table)
    with pytest.raises(TraceError, match=words) as error:
        read_foreign(path, num_experts=4)
    assert "docs/traces.md" in str(error.value)
