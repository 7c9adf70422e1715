"""`melinoe simulate --out`: the same figures as a record, with intervals over sequences."""

import json

import numpy as np
from cache_traces import random_trace
from typer.testing import CliRunner

from melinoe.cache.simulator import simulate
from melinoe.cli.app import app
from melinoe.report import render_table


def test_a_record_holds_what_was_printed_with_intervals_over_sequences(tmp_path):
    """Two policies, two numbers of slots: means equal the table's, and resample its sequences."""
    trace, out = tmp_path / "t.safetensors", tmp_path / "runs.jsonl"
    random_trace(3, sequences=5).save(trace)
    wanted = ("--slots", "3", "--slots", "5", "--policy", "lru", "--policy", "belady", "--cold")
    times = ("--link", "1GB/s", "--pass-time", "1ms", "--expert-size", "1MB")
    arguments = ["simulate", str(trace), *wanted, *times, "--json", "--out", str(out)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    (record,) = map(json.loads, out.read_text().splitlines())
    assert len(record["result"]) == len(printed) == 4
    for row, said in zip(record["result"], printed, strict=True):
        assert (row["policy"], row["slots"]) == (said["policy"], said["slots"])
        assert row["hit_rate"]["mean"] == said["hit_rate"]
        assert row["transfers_per_token"]["mean"] == said["transfers_per_token"]
        assert row["zero_miss_tokens"]["mean"] == said["zero_miss_tokens"]
        assert row["predicted_ms"] == said["ms_per_token"]
        assert row["hit_rate"]["n"] == 5
    # The lowest and the highest sequence bound every interval.
    each = simulate(random_trace(3, sequences=5), 3, "lru", reset_between_sequences=True)
    rates = [np.sum(one.hits[1]) / np.sum(one.uses[1]) for one in each.per_sequence]
    first = record["result"][0]["hit_rate"]
    assert min(rates) <= first["low"] < first["mean"] < first["high"] <= max(rates)
    assert "belady" in render_table([out], "text", 200)


def test_a_record_is_refused_where_nothing_is_replayed(tmp_path):
    """Curves and locality are no replays, so the file would quietly not be written."""
    trace, out = tmp_path / "t.safetensors", tmp_path / "runs.jsonl"
    random_trace(3, sequences=2).save(trace)
    for instead in ("--curve", "--locality"):
        done = CliRunner().invoke(app, ["simulate", str(trace), instead, "--out", str(out)])
        assert done.exit_code == 2 and "--out" in done.output
    assert not out.exists()
