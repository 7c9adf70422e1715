"""A policy and a prefetch of one's own, the code of docs/traces.md, used wherever ours are."""

import json
import re
import textwrap
from pathlib import Path

import pytest
import torch
from small_olmoe import tiny_model, words_tokenizer
from typer.testing import CliRunner

from melinoe import attach, config
from melinoe.cache import policy as policies
from melinoe.cache import prefetch as prefetches
from melinoe.cache.curves import miss_curves
from melinoe.cache.prefetch import prefetcher
from melinoe.cache.simulator import simulate
from melinoe.cli.app import app
from melinoe.generate import generate, trace_prompts
from melinoe.measure import serve

PAGE = Path(__file__).parents[2] / "docs" / "traces.md"
PROMPTS = [[3, 4, 3, 4], [9, 9, 8], [20, 3, 20]]


def blocks(page):
    """The indented blocks of a page's last two sections, as they would stand in files."""
    text = page[page.index("## A policy of your own") :]
    found = re.findall(r"(?:^    .*\n|^\n(?=    ))+", text, re.MULTILINE)
    return [textwrap.dedent(block).strip() + "\n" for block in found]


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """Both are known, and forgotten afterwards."""
    for module in (policies, prefetches):
        monkeypatch.setattr(module, "_known", dict(module._known))
    for block in blocks(PAGE.read_text()):
        exec(block, {})


def test_the_runtime_serves_with_both_and_the_simulator_counts_what_it_counted():
    """The same text as without, and every counter; the miss curves know the policy too."""
    model, tokenizer = tiny_model(), words_tokenizer()
    plain = [generate(model, None, tokenizer, one, 6).ids for one in PROMPTS]
    chosen = prefetcher("repeated")
    with attach(model, slots=3, policy="mru") as handle:
        served = [
            generate(model, handle, tokenizer, one, 6, prefetch=chosen).ids for one in PROMPTS
        ]
        handle.reset_cache()
        handle.reset_counters()
        trace = trace_prompts(model, handle, tokenizer, PROMPTS, 6, prefetch=chosen)
        counted = handle.counters
    assert served == plain
    assert simulate(trace, 3, "mru", prefetch=chosen).counters == counted
    assert counted.prefetch_loads.sum() > 0
    loads = simulate(trace, 3, "mru").counters.loads
    assert (miss_curves(trace, "mru")[:, :, 2] == loads).all()
    assert not (simulate(trace, 3, "lru").counters.loads == loads).all()
    assert "mru" in config.policies()


def test_the_command_line_knows_both(tmp_path):
    """`simulate` and `generate` take their names, and name them beside an unknown one."""
    model, tokenizer = tiny_model(), words_tokenizer()
    with attach(model, slots=8) as handle:
        trace_prompts(model, handle, tokenizer, PROMPTS, 6).save(tmp_path / "t.safetensors")
    run = CliRunner()
    asked = ["--policy", "mru", "--prefetch", "repeated", "--slots", "3", "--json"]
    result = run.invoke(app, ["simulate", str(tmp_path / "t.safetensors"), *asked])
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)
    assert (row["policy"], row["prefetch"]) == ("mru", "repeated")
    assert row["prefetch_per_token"] > 0
    result = run.invoke(
        app, ["generate", "tiny", "Tom has 3 3 3", *asked, "--max-new-tokens", "3",
              "--device", "cpu"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["prefetch"] == "repeated"
    result = run.invoke(app, ["generate", "tiny", "Tom", "--prefetch", "psychic"])
    assert result.exit_code == 2 and "repeated" in result.output


def test_a_report_shows_both(tmp_path):
    """A record of serving with them, written down and reported like any other."""
    model, tokenizer = tiny_model(), words_tokenizer()
    with attach(model, slots=3, policy="mru") as handle, torch.inference_mode():
        record = serve(
            model, handle, tokenizer, PROMPTS, 4, prefetch=prefetcher("repeated"), label="tiny"
        )
    assert (record["policy"], record["prefetch"]) == ("mru", "repeated")
    (tmp_path / "runs.jsonl").write_text(json.dumps(record) + "\n")
    out = tmp_path / "report.html"
    result = CliRunner().invoke(app, ["report", str(tmp_path / "runs.jsonl"), "--out", str(out)])
    assert result.exit_code == 0, result.output
    for page in (out, out.with_suffix(".md")):
        assert "mru" in page.read_text()
