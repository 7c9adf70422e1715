"""The benchmark of training on a GPU runs from end to end without one, on tiny shapes."""

import json
import sys

from gpu_scripts import imported


def test_a_dry_run_measures_all_three_ways(tmp_path, monkeypatch, capfd):
    """Melinoe's two and PEFT's, each by its own Trainer; a JSON line at the end."""
    out = tmp_path / "result.json"
    script = imported(monkeypatch, "training")
    monkeypatch.setattr(sys, "argv", ["training.py", "--dry-run", "--out", str(out)])
    script.main()
    done = capfd.readouterr()
    record = json.loads(out.read_text())
    assert record["not_measured"] == [], done.err[-3000:]
    assert json.loads(done.out.splitlines()[-1])["result"] == record["result"]
    assert [row["way"] for row in record["result"]] == [
        "melinoe, default terms",
        "melinoe, next-token loss alone",
        "transformers and PEFT, next-token loss alone",
    ]
    for row in record["result"]:
        low, high = row["tokens_per_s_range"]
        assert 0 < low <= row["tokens_per_s"] <= high
        assert (
            row["tokens_per_s"] * row["step_s"] == 16
            or abs(row["tokens_per_s"] * row["step_s"] - 16) < 1e-6
        )  # two sequences of eight tokens
        assert row["peak_gpu_bytes"] is None  # no allocator counts on the CPU
    assert record["times_peft"] > 0 and record["terms_share_of_step"] < 1
