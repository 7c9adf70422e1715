"""The GPU benchmark runs from end to end without a GPU, on tiny shapes, through the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu" / "fast_engine.py"


def run_dry(out, *options):
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), "--dry-run", "--out", str(out), *options],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_dry_run_measures_every_section_and_judges_every_goal(tmp_path):
    """All engines on one drawn routing, whose loads the engines must count; JSON at the end."""
    out = tmp_path / "result.json"
    done = run_dry(out)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(out.read_text())
    assert json.loads(done.stdout.splitlines()[-1])["benchmark"] == record["benchmark"]
    assert record["dry_run"] is True and "drawn" in record["routing"]
    assert {"copy_engine", "kernel_reads", "device"} <= record["bandwidth_bytes_per_s"].keys()
    rows = record["result"]
    engines = {row["engine"] for row in rows if row["section"] == "decode"}
    assert engines == {
        "fast",
        "fast, planned by the host",
        "fast, all resident",
        "fast, all resident, batched_mm",
        "fast, all resident, by generate",
        "fast, all resident, compiled",
        "fast, compiled",
        "reference",
        "on demand, no cache",
        "transformers, eager",
        "transformers, in our graph",
        "transformers, batched_mm, eager",
        "transformers, batched_mm, in our graph",
        "transformers, static cache and compile",
        "accelerate, experts on the CPU",
    }
    assert {row["experts"] for row in rows if row["section"] == "split"} == {"bf16", "int8", "int4"}
    compiled = [row for row in rows if "compiled" in row.get("engine", "")]
    assert len(compiled) == 3 and all(row["compile_s"] > 0 for row in compiled)
    assert sum("compiled" in goal["goal"] for goal in record["goals"]) == 3
    assert {row["section"] for row in rows} == {"decode", "prefill", "split"}
    decode = [row for row in rows if row["section"] == "decode"]
    forced = [row for row in decode if row["miss_rate"] == 0.5 and row["engine"] == "fast"]
    # Two layers, two choices a token, half of them missing: two loads a step in the mean.
    single = [row for row in forced if row["batch"] == 1]
    assert all(0 < row["loads_per_step"] <= 4 for row in single) and len(single) == 4
    assert {row["batch"] for row in forced} == {1, 4}
    met = {goal["goal"]: goal["measured"] for goal in record["goals"]}
    assert met["tok/s, OLMoE, 60 experts a token, 4 bits"] > 0
    assert len(record["goals"]) == 9
    assert all(goal["met"] in (True, False, None) for goal in record["goals"])
    assert all("moe-policylang" in one["section"] for one in record["not_measured"])
    assert record["bandwidth_bytes_per_s"]["gpu"] is None
    assert {one["experts"] for one in record["stores"]} == {"bf16", "int8", "int4"}
    # What the file has is kept: with --resume only the section that failed is tried again.
    before = len(record["result"])
    done = run_dry(out, "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    again = json.loads(out.read_text())
    assert len(again["result"]) == before and again["sections"] == record["sections"]
    assert again["not_measured"] == record["not_measured"]
