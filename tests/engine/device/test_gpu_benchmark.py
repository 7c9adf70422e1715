"""The GPU benchmark runs from end to end without a GPU, on tiny shapes, through the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

from gpu_scripts import imported

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "gpu" / "run.sh"
ENGINES = {
    "A": {
        "fast",
        "fast, all resident",
        "fast, all resident, batched_mm",
        "fast, all resident, by generate",
    },
    "B": {
        "fast",
        "reference",
        "on demand, no cache",
        "transformers, eager",
        "transformers, in our graph",
        "transformers, batched_mm, eager",
        "transformers, batched_mm, in our graph",
        "transformers, static cache and compile",
        "accelerate, experts on the CPU",
    },
}


def typed(call, folder, says=""):
    """Run run.sh with a Python that says *says*: what it is given, and what run.sh prints."""
    python = folder / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > "$GIVEN"\ncat "$SAYS"\n')
    python.chmod(0o755)
    (folder / "says").write_text(says)
    environment = os.environ | {
        "OPTIONS": "--dry-run", "PYTHON": str(python), "GIVEN": str(folder / "given"),
        "SAYS": str(folder / "says"),
    }  # fmt: skip
    done = subprocess.run(
        ["bash", str(SCRIPT), call, str(folder)], env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-1000:]
    return (folder / "given").read_text().splitlines(), done.stdout


def test_a_dry_run_of_both_calls_measures_every_section_and_judges_every_goal(
    tmp_path, monkeypatch, capfd
):
    """All engines on one drawn routing, whose loads the engines must count; B goes on from A."""
    fast_engine = imported(monkeypatch, "fast_engine")

    def measured(call):
        words, _ = typed(call, tmp_path)
        assert words[0] == "benchmarks/gpu/fast_engine.py"
        monkeypatch.setattr(sys, "argv", words)
        capfd.readouterr()
        fast_engine.main()
        _, said = typed(call, tmp_path, capfd.readouterr().out)
        return json.loads((tmp_path / f"{call}.json").read_text()), said

    first, said = measured("A")
    assert first["not_measured"] == [] and first["dry_run"] is True and "drawn" in first["routing"]
    assert "passed: packed experts" in said and "GB/s: copy_engine" in said
    assert {"copy_engine", "kernel_reads", "kernel_share", "device"} <= first["link"].keys()
    assert {one["by"] for one in first["link"]["tried"]} == {"kernel", "copy engine"}
    assert {one["experts"] for one in first["link"]["tried"]} == {1, 2, 8, 16}
    rows = first["result"]
    kinds = {row["section"] for row in rows}
    assert kinds == {"card", "smoke", "decode", "prefill", "split", "profile"}
    smoke = [row for row in rows if row["section"] == "smoke"]
    assert len(smoke) == 4 and all(row["passed"] for row in smoke), smoke
    assert (tmp_path / "replay.json.gz").stat().st_size > 0

    second, _ = measured("B")
    assert second["not_measured"] == [] and second["link"] == first["link"]
    rows = [*rows, *second["result"]]
    decode = [row for row in rows if row["section"] == "decode"]
    for call, record in (("A", first), ("B", second)):
        found = {row["engine"] for row in record["result"] if row["section"] == "decode"}
        assert found == ENGINES[call]
    forced = [row for row in decode if row["miss_rate"] == 0.5 and row["engine"] == "fast"]
    # Two layers, two choices a token, half of them missing: two loads a step in the mean.
    single = [row for row in forced if row["batch"] == 1]
    assert all(0 < row["loads_per_step"] <= 4 for row in single) and len(single) == 3
    products = [row for row in second["result"] if row["section"] == "products"]
    formats = {row["experts"] for row in products if row["engine"] == "fast"}
    assert formats == {"plain", "int8", "int4", "mxfp4", "fp8"}
    assert {row["pairs"] for row in products} == {2, 8, 32}
    assert all(row["bytes_per_s"] > 0 for row in products)
    met = {goal["goal"]: goal["measured"] for goal in second["goals"]}
    assert met["tok/s, OLMoE, all resident"] > 0  # judged by what call A measured
    assert met["tok/s, OLMoE, 60 experts a token, 4 bits"] > 0

    # What a file has is kept with --resume: it is read back as what happened, section by section.
    events = fast_engine.events_of(first)
    assert {e["section"] for e in events if e["event"] == "end"} == first["sections"].keys()
    again = fast_engine.record_of(events, dry=True)
    assert [again[k] for k in ("result", "stores", "link", "goals")] == [
        first[k] for k in ("result", "stores", "link", "goals")
    ]
