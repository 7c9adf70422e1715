# ruff: noqa: RUF001  (dashes and minus signs as a reader sees them)
"""Ratios with their intervals: paired where records list prompts or sequences, by hand."""

import math

import pytest

from melinoe.report import render_table, update_readme
from melinoe.report.comparing import factor, increase, quotient
from melinoe.report.records import read_records
from melinoe.report.tables import comparison_table, score_table


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
def scored():
    about = {"domain": "gsm8k", "metric": "exact_match"}
    return [
        {"kind": "score", "model": "base", **about, "score": estimate(0.0, 0.0, 8), "right": 0},
        {"kind": "score", "model": "fine-tuned", **about, "score": estimate(0.25, 0.2, 8),
         "right": 2, "how": "greedy"},
        {"kind": "comparison", "model": "fine-tuned", "other": "base", **about,
         "change": estimate(0.25, 0.2, 8), "relative": False, "better": "fine-tuned"},
        {"kind": "comparison", "model": "fine-tuned", "other": "base", "domain": "gsm8k",
         "metric": "perplexity", "change": estimate(0.01, 0.02, 8), "relative": True},
    ]  # fmt: skip


def test_scores_and_comparisons_become_tables(scored):
    """A row per metric with how many were right; a row per comparison with the better model."""
    found = read_records(scored)
    (row,) = score_table(found).rows
    assert [cell.inline() for cell in row] == [
        "gsm8k: exact match",
        "0.00 [0.00–0.00] (0 of 8)",
        "0.250 [0.050–0.450] (2 of 8)",
    ]
    first, second = ([cell.inline() for cell in row] for row in comparison_table(found).rows)
    assert first[1:] == ["0.250 [0.050–0.450]", "fine-tuned"]
    assert second[1:] == ["+1.0 % [−1.0, +3.0]", "no difference shown"]
    assert "exact match" in render_table(scored, "markdown")


def test_scores_and_comparisons_fill_their_places_in_a_markdown_file(scored, tmp_path):
    """The tables of the page, under the names `scores` and `comparisons`."""
    path = tmp_path / "study.md"
    names = ("scores", "comparisons")
    path.write_text("".join(f"<!-- report:{one} --><!-- /report:{one} -->\n" for one in names))
    assert update_readme(path, scored) == list(names)
    assert "| gsm8k: exact match | 0.00 [0.00–0.00] (0 of 8) |" in path.read_text()
    assert "| exact match, gsm8k: fine-tuned against base |" in path.read_text()
