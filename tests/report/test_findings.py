"""Each claim of docs/findings.md against the committed evidence: no new run leaves it behind."""

import json
from pathlib import Path

import pytest

from benchmarks.tables import update_readme

ROOT = Path(__file__).parents[2]
EVIDENCE = ROOT / "benchmarks" / "results" / "evidence.jsonl"


@pytest.fixture(scope="module")
def of():
    """Benchmark name, without its prefix -> rows."""
    lines = map(json.loads, EVIDENCE.read_text().splitlines())
    return {one["benchmark"].removeprefix("evidence-"): one["result"] for one in lines}


@pytest.fixture(scope="module")
def answer(of):
    """Question -> its four answers, base before fine-tuned, in domain before out of it."""
    return {row["question"]: list(row.values())[1:] for row in of["answers"]}


def below(estimate):
    return estimate["high"] < 0


def above(estimate):
    return estimate["low"] > 0


def test_no_policy_is_best_everywhere(of, answer):
    """LRU nowhere, static on the fine-tuned model, least-stale behind all; Belady far ahead."""
    best = answer["the policy that can serve with the fewest transfers"]
    assert set(best) == {"lfru", "lfu", "static"} and best[2:] == ["static", "static"]
    for case in of["policies"]:
        if case["slots"] == 8:
            means = {p: case[p]["mean"] for p in ("lru", "lfu", "lfru", "score", "static")}
            assert case["least-stale"]["low"] > max(means.values())
            left = min(means.values()) - case["belady"]["mean"]
            assert left > 2 * (means["lfu"] - min(means.values()))
    assert all(one["low"] > 1.2 for one in answer["its transfers over Belady's"])


def test_no_prefetch_lowers_the_copies_in_all(of, answer):
    """None is shown to at a quarter; the prompt's own add least; next-router's waits are dear."""
    for row in of["prefetch"]:
        assert row["prefetch"] == "none" or not below(row["all copies, minus none"])
    assert answer["the prefetch with the fewest copies in all"] == ["prefill"] * 4
    waits = ["next-router", "next-router", "prefill", "predictor"]
    assert answer["the prefetch that leaves the fewest to wait for"] == waits
    saved = answer["its transfers on demand, minus none's"]
    more = answer["and its copies in all, minus none's"]
    for which in (0, 1):
        assert more[which]["low"] > 2 * -saved[which]["low"]


def test_slots_by_layer_save_in_all_cases_but_one(of):
    """That is the fine-tuned model's domain at a quarter, LFU; at a half hardly a load is left."""
    rows, own = of["allocation"], ("fine-tuned", "GSM8K")
    (spared,) = [row for row in rows if not below(row["difference"])]
    case = (spared["model"], spared["domain"], spared["slots"], spared["policy"])
    assert case == (*own, 8, "lfu") and not above(spared["difference"])
    for row in rows:
        if (row["model"], row["domain"], row["slots"]) == (*own, 16):
            assert row["transfers, allocated"]["high"] < 0.05 * row["transfers, uniform"]["low"]


def test_what_cache_aware_choice_costs(answer):
    """0.1 costs the fine-tuned model, 0.3 both; rerouting changes little of anything."""
    assert all(one["high"] < -20 for one in answer["cache-prior 0.1: transfers (%)"])
    mild_price = answer["cache-prior 0.1: perplexity (%)"]
    assert list(map(above, mild_price)) == [False, False, True, True]
    assert mild_price[2]["mean"] < mild_price[3]["mean"]
    assert all(map(above, answer["cache-prior 0.3: perplexity (%)"]))
    for mild, strong in zip(
        answer["cache-prior 0.1: transfers (%)"],
        answer["cache-prior 0.3: transfers (%)"],
        strict=True,
    ):
        assert strong["high"] < mild["low"]
    price = [one["mean"] for one in answer["cache-prior 0.3: perplexity (%)"]]
    assert min(price) == price[2]  # fine-tuned, GSM8K: trained under a prior, on that domain
    for name in ("transfers", "perplexity"):
        assert all(abs(one["mean"]) < 3 for one in answer[f"reroute 0.5: {name} (%)"])


def test_the_page_s_tables_are_those_of_the_evidence():
    """What `make check` asks, of this page: every record of the results may fill a table."""
    assert update_readme(ROOT / "docs" / "findings.md", [EVIDENCE.parent], check=True) == []
