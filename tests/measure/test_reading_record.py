# ruff: noqa: RUF001  (the dash is meant: it is what a reader sees)
"""What a cache moves while a model reads: one record, and its column in the table."""

import numpy as np
import pytest

from melinoe.cache.trace import COMPLETION_ROW, PROMPT_ROW, Trace
from melinoe.measure import reading_record
from melinoe.report import read_records
from melinoe.report.tables import main_table, servings


def trace():
    """One layer, top-1. Two texts: a prompt of two tokens, then A B A C, and a prompt, then A A."""
    experts = [5, 6, 0, 1, 0, 2, 7, 0, 0]
    kinds = [PROMPT_ROW] * 2 + [COMPLETION_ROW] * 4 + [PROMPT_ROW] + [COMPLETION_ROW] * 2
    return Trace(
        experts=np.array(experts, dtype=np.int16).reshape(-1, 1, 1),
        forward=np.array([0, 0, 1, 2, 3, 4, 5, 6, 7], dtype=np.int32),
        sequence=np.array([0] * 6 + [1] * 3, dtype=np.int32),
        kind=np.array(kinds, dtype=np.uint8),
        num_experts=8,
    )


def test_each_text_begins_with_an_empty_cache_and_its_prompt_counts_for_nothing():
    """By hand, LRU with two slots: A B miss, A hits, C misses; then A misses and hits."""
    record = reading_record(trace(), "m", 2, "lru")
    assert record["per_prompt"] == {"prompt_tokens": [2, 1], "loads": [3, 1], "tokens": [4, 2]}
    assert record["transfers_per_token"]["mean"] == pytest.approx(4 / 6)
    assert (record["kind"], record["slots"], record["policy"]) == ("reading", 2, "lru")


def served(model, policy="lru"):
    """A serve record with nothing but what a table must have."""
    about = {"kind": "serve", "model": model, "strategy": model, "slots": 2, "num_experts": 8}
    return {**about, "policy": policy, "hit_rate": None}


def test_the_table_has_a_column_for_what_all_models_read():
    """Half the loads on the same texts: 2 times fewer, paired; other slots are left out."""
    base = reading_record(trace(), "base", 2, "lru")
    tuned = {**base, "model": "fine-tuned"}
    tuned["per_prompt"] = {**base["per_prompt"], "loads": [1.5, 0.5]}
    tuned["transfers_per_token"] = {"mean": 2 / 6, "low": 0.25, "high": 0.375, "n": 2}
    other = {**base, "model": "fine-tuned", "slots": 4}
    found = read_records([served("base"), served("fine-tuned"), base, tuned, other])
    table = main_table(found, servings(found)[0])
    place = table.columns.index("transfers / token, reading the same text")
    cells = {row[0].text: row[place].inline() for row in table.rows}
    assert cells["base"].startswith("0.667 [")
    assert cells["fine-tuned"] == "0.333 [0.250–0.375] (÷ 2.00 [2.00, 2.00])"
    assert any("nothing is prefetched" in note for note in table.notes)


def test_without_such_records_there_is_no_column():
    """Serving alone: the table is as it was."""
    found = read_records([served("base")])
    assert all("reading" not in name for name in main_table(found, servings(found)[0]).columns)
