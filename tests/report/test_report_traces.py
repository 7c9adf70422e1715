"""Traces and benches in a report: what is replayed, where it stands, and that it repeats itself."""

import subprocess
import sys

import numpy as np
import pytest
from report_records import estimate, serve_record
from trace_builder import TraceBuilder
from typer.testing import CliRunner

from benchmarks.tables import benchmark_table
from melinoe.cli.app import app
from melinoe.errors import MelinoeError
from melinoe.measure import trace_records
from melinoe.report import read_records
from melinoe.report.page import assemble
from melinoe.report.tables import servings


def two_sequences():
    """Two layers of four experts, top-1: layer 0 always chooses 0, layer 1 goes round 0 1 2 3 0."""
    builder = TraceBuilder(2, 4, 1)
    for sequence in range(2):
        for token in range(5):
            chosen = np.array([[[0], [token % 4]]])
            builder.add_forward(chosen, sequence, int(token > 0))
    return builder.trace()


def test_a_trace_is_replayed_with_the_compiled_policies():
    """One slot of four: layer 0 always hits, layer 1 never; four: its fourth token comes back."""
    records = trace_records(two_sequences(), "mine")
    curves = {one["policy"]: one for one in records if one["kind"] == "curve"}
    assert list(curves) == ["lru", "lfu", "static", "belady"]
    assert curves["lru"]["slots"] == [1, 2, 3, 4]
    rates = [one["mean"] for one in curves["lru"]["hit_rate"]]
    assert rates == pytest.approx([8 / 16, 8 / 16, 8 / 16, 10 / 16])
    assert {one["kind"] for one in records} == {"locality", "curve"}


def test_policies_are_chosen_by_name_and_progress_is_told():
    """Four sizes of each; a policy named twice counts once."""
    told = []
    records = trace_records(
        two_sequences(), "mine", ["static", "lru", "static"], lambda *now: told.append(now)
    )
    assert [one["policy"] for one in records if one["kind"] == "curve"] == ["static", "lru"]
    assert told == [(done, 8) for done in range(1, 9)]
    with pytest.raises(MelinoeError, match="oldest"):
        trace_records(two_sequences(), "mine", ["oldest"])


def test_the_command_reports_traces(tmp_path):
    """Two figures in both twins; two traces of one name told apart; the same bytes again."""
    paths = [tmp_path / place / "t.safetensors" for place in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        two_sequences().save(path)
    out = tmp_path / "r.html"
    told = ["report", *map(str, paths), "--out", str(out)]
    assert CliRunner().invoke(app, told).exit_code == 0
    text, twin = out.read_text(), out.with_suffix(".md").read_text()
    for words in ("Hit rate against slots", "Experts a sequence uses"):
        assert words in text
    for words in ("t, static", "Hit rate against slots", "a/t", "b/t"):
        assert words in text and words in twin
    # Another process hashes names in another order.
    subprocess.run([sys.executable, "-m", "melinoe", *told], check=True, capture_output=True)
    assert out.read_text() == text


def test_the_command_replays_the_policies_it_is_told(tmp_path):
    """A policy needs a trace to replay; its curve alone stands in the page."""
    two_sequences().save(tmp_path / "t.safetensors")
    out = tmp_path / "r.html"
    told = ["report", str(tmp_path / "t.safetensors"), "--out", str(out), "--policy", "lfu"]
    assert CliRunner().invoke(app, told).exit_code == 0
    twin = out.with_suffix(".md").read_text()
    assert "| t, lfu |" in twin and "t, lru" not in twin
    (tmp_path / "r.json").write_text("[]")
    told[1] = str(tmp_path / "r.json")
    assert CliRunner().invoke(app, told).exit_code == 2


def benched(strategy, slots, **changes):
    """A serve record of `melinoe bench`."""
    record = serve_record("base", slots=slots, **changes)
    return {**record, "strategy": strategy, "predicted": {"counts_equal": True}}


BENCH = {
    "benchmark": "bench",
    "title": "Predicted and measured",
    "result": [{"strategy": "lru", "slots": 8, "measured_ms": estimate(5, 1)}],
}


def sections(parts):
    """Title of each section -> names of its tables and figures."""
    found = {}
    for part in parts:
        if isinstance(part, str):
            title = part.removeprefix("## ") if part.startswith("## ") else None
            found |= {title: []} if title else {}
        else:
            found[[*found][-1]].append(part.name)
    return found


def test_a_bench_stands_beside_a_demo_and_changes_none_of_its_tables():
    """Its runs are of one model by several strategies: no rows of a comparison of models."""
    demo = [serve_record("base"), serve_record("fine-tuned")]
    more = [benched("lru", 8), benched("lfu", 16)]
    assert servings(read_records(demo)) == servings(read_records([*demo, *more, BENCH]))
    where = sections(assemble(read_records([*demo, *more, BENCH])))
    assert where["Strategies"] == ["main"]


def test_what_brackets_mean_is_said_where_there_are_some():
    """Means have intervals, medians the range that was seen; empty columns are left out."""
    for value in ({"mean": 1, "low": 0, "high": 2, "n": 4}, {"median": 1, "p5": 0, "p95": 2}):
        table = benchmark_table({"benchmark": "x", "result": [{"a_ms": value, "b": None}]})
        assert table.notes[0].startswith("Below or in brackets")
        assert table.columns == ["a (ms)"]
    assert benchmark_table({"benchmark": "x", "result": [{"a": 1}]}).notes == []


def test_a_page_with_another_name_is_refused_before_any_replay(tmp_path, monkeypatch):
    """A trace of hours of text takes its time; the name is known at once."""
    monkeypatch.setattr("melinoe.cli.report._with_traces", lambda *_: pytest.fail("replayed"))
    path = tmp_path / "trace.safetensors"
    two_sequences().save(path)
    done = CliRunner().invoke(app, ["report", str(path), "--out", str(tmp_path / "page")])
    assert isinstance(done.exception, MelinoeError)
    assert "let it end in .html" in str(done.exception)
