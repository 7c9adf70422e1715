"""
A policy and a prefetch of a package that pip installed, used everywhere that ours are.

The package's modules are the code of docs/traces.md, as it stands there.
"""

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from outside import fresh_registries
from small_olmoe import tiny_model, words_tokenizer
from typer.testing import CliRunner

from melinoe import attach, config
from melinoe.cache.curves import miss_curves
from melinoe.cache.prefetch import prefetcher
from melinoe.cache.simulator import simulate
from melinoe.cli.app import app
from melinoe.generate import generate, trace_prompts
from melinoe.measure import serve

PAGE = Path(__file__).parents[1] / "docs" / "traces.md"
PROMPTS = [[3, 4, 3, 4], [9, 9, 8], [20, 3, 20]]
PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "my-package"
version = "1.0"
"""


def blocks(page):
    """The indented blocks of a page's last two sections, as they would stand in files."""
    text = page[page.index("## A policy of your own") :]
    found = re.findall(r"(?:^    .*\n|^\n(?=    ))+", text, re.MULTILINE)
    return [textwrap.dedent(block).strip() + "\n" for block in found]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Where pip installed the package; its files are what docs/traces.md shows."""
    project, target = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("site")
    policy, policy_point, prefetch, prefetch_point = blocks(PAGE.read_text())
    (project / "pyproject.toml").write_text(PROJECT + "\n" + policy_point + "\n" + prefetch_point)
    package = project / "my_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "policies.py").write_text(policy)
    (package / "prefetch.py").write_text(prefetch)
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index",
         "--no-build-isolation", "--disable-pip-version-check", "--target", target, project],
        check=True,
    )  # fmt: skip
    return target


@pytest.fixture(autouse=True)
def installed(site, monkeypatch):
    """The package can be imported, and nothing of it has been looked up before."""
    monkeypatch.syspath_prepend(str(site))
    fresh_registries(monkeypatch)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
        del sys.modules[name]


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
    assert counted.prefetch_used.sum() > 0
    loads = simulate(trace, 3, "mru").counters.loads
    assert (miss_curves(trace, "mru").loads[:, :, 2] == loads).all()
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
    assert row["prefetch_precision"] is not None
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
