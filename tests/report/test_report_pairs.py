# ruff: noqa: RUF001  (dashes and minus signs as a reader sees them)
"""Ratios with their intervals: paired where records list prompts or sequences, by hand."""

import math

import pytest

from benchmarks.tables import update_readme
from melinoe.report import render_table
from melinoe.report.comparing import factor, increase, quotient
from melinoe.report.records import read_records
from melinoe.report.tables import comparison_table


def estimate(mean, half=0.0, n=4):
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


def serve(loads, tokens, mean, lengths=(3, 5, 4)):
    columns = {"prompt_tokens": list(lengths), "loads": loads, "tokens": tokens}
    return {"transfers_per_token": estimate(mean, 0.5), "per_prompt": columns}


def test_a_ratio_over_the_same_prompts_is_paired():
    """Half the loads on every prompt: 2, whatever is drawn, though each interval is wide."""
    base, ours = serve([8, 40, 6], [4, 8, 6], 3.0), serve([4, 20, 3], [4, 8, 6], 1.5)
    assert factor(ours, base, "transfers_per_token", "÷") == "÷ 2.00 [2.00, 2.00]"


def test_other_prompts_are_not_paired():
    """Other lengths, other prompts: no ratio."""
    base, ours = serve([8, 40, 6], [4, 8, 6], 3.0), serve([4, 20, 3], [4, 8, 6], 1.5, (3, 5, 9))
    assert quotient(base, ours, "transfers_per_token") is None


def test_nothing_moved_is_no_divisor():
    """No ratio, rather than an infinite one."""
    base, ours = serve([8, 40, 6], [4, 8, 6], 3.0), serve([0, 0, 0], [4, 8, 6], 0.0)
    assert factor(ours, base, "transfers_per_token", "÷") == ""
    assert factor(ours, None, "transfers_per_token", "÷") == ""


def quality(domain, nll, tokens=(5, 10)):
    total = math.exp(sum(nll) / sum(tokens))
    rows = {"nll": list(nll), "tokens": list(tokens)}
    return {"domain": domain, "perplexity": estimate(total, 0.1), "per_sequence": rows}


def test_an_increase_is_paired_by_sequence():
    """.02 nat more on every token: exp(.02) - 1 = 2.0 %, without width."""
    ours, theirs = quality("a", (10.1, 20.2)), quality("a", (10.0, 20.0))
    assert increase([ours], [theirs]) == "+2.0 % [+2.0, +2.0]"


def test_an_increase_over_several_texts_is_their_geometric_mean():
    """.02 and .06 nat more: exp(.04) - 1 = 4.1 %; without sequences there is none."""
    ours = [quality("a", (10.1, 20.2)), quality("b", (10.3, 20.6))]
    theirs = [quality("a", (10.0, 20.0)), quality("b", (10.0, 20.0))]
    assert increase(ours, theirs) == "+4.1 % [+4.1, +4.1]"
    bare = [{key: r[key] for key in ("domain", "perplexity")} for r in ours]
    assert increase(bare, theirs) == ""
    assert increase(ours, theirs[:1]) == ""  # one of the texts is missing


@pytest.fixture
def compared():
    about = {"kind": "comparison", "model": "fine-tuned", "other": "base", "domain": "gsm8k"}
    return [
        {**about, "metric": "exact_match", "change": estimate(0.25, 0.2, 8), "relative": False,
         "better": "fine-tuned"},
        {**about, "metric": "perplexity", "change": estimate(0.01, 0.02, 8), "relative": True},
    ]  # fmt: skip


def test_comparisons_become_a_table(compared):
    """A row per comparison with the better model."""
    table = comparison_table(read_records(compared))
    first, second = ([cell.inline() for cell in row] for row in table.rows)
    assert first[1:] == ["0.250 [0.050–0.450]", "fine-tuned"]
    assert second[1:] == ["+1.0 % [−1.0, +3.0]", "no difference shown"]
    assert "exact match" in render_table(compared, "markdown")


def test_comparisons_fill_their_place_in_a_markdown_file(compared, tmp_path):
    """The table of the page, under the name `comparisons`."""
    path = tmp_path / "study.md"
    path.write_text("<!-- report:comparisons --><!-- /report:comparisons -->\n")
    assert update_readme(path, compared) == ["comparisons"]
    assert "| exact match, gsm8k: fine-tuned against base |" in path.read_text()
