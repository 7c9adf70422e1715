"""The experiment on kinds of text: what pinned sets miss, terms of rows, and the table."""

import importlib
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from melinoe.finetune import objective, training
from melinoe.losses import completion_positions

KINDS = Path(__file__).parents[1] / "benchmarks" / "kinds"


@pytest.fixture
def module(monkeypatch):
    """Import a file of the experiment by name, as its own scripts do."""
    monkeypatch.syspath_prepend(KINDS)
    for name in ("texts", "judge", "terms", "table", "run"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module
    for name in ("texts", "judge", "terms", "table", "run"):
        sys.modules.pop(name, None)


def test_what_pinned_sets_miss_worked_by_hand(module):
    """One layer, four experts, a set of one: two texts of two kinds, their halves apart."""
    uses = {
        "a": np.array([[[3, 1, 0, 0], [2, 2, 0, 0]], [[0, 4, 0, 0], [0, 4, 0, 0]]]),
        "b": np.array([[[0, 0, 4, 0], [0, 0, 4, 0]], [[0, 0, 3, 1], [0, 0, 4, 0]]]),
    }
    uses = {kind: counts[:, :, None] for kind, counts in uses.items()}
    found = module("judge")._pinned("a", uses, ["a", "b"], 1)
    assert {rule: missed[0] for rule, missed in found.items()} == {
        "global": 8,  # expert 2, which all other texts use most
        "kind": 5,  # expert 1
        "other kind": 8,
        "other sequence": 5,
        "own": 3,
        "first half": 2,  # expert 0, in the second half
        "kind, second half": 2,
    }


def test_a_fixed_set_costs_each_use_of_another_expert_and_only_while_it_is_open(module):
    """The base uses expert 0 most; tokens that choose (0, 1) and (2, 3) miss one and two."""
    terms = module("terms")
    before = objective.cache_simulation_loss, training.Objective
    uses = {"a": np.array([[5, 1, 0, 0]]), "b": np.array([[4, 0, 3, 0]])}
    logits = torch.zeros(1, 2, 1, 4, requires_grad=True)
    chosen = torch.tensor([[[[0, 1]], [[2, 3]]]])
    counts = completion_positions(torch.ones(1, 2, dtype=torch.bool))
    with terms.in_place_of_cache_loss(terms.FIXED, uses, {"a": [], "b": []}):
        loss = objective.cache_simulation_loss(
            logits, chosen, counts, gamma=0.9, capacity=1, num_experts=4, form="", denominator=2.0
        )
    assert loss.tolist() == [pytest.approx(1.5)]
    loss.sum().backward()
    assert logits.grad[0, 0, 0, 0] < 0 < logits.grad[0, 0, 0, 1]
    assert (objective.cache_simulation_loss, training.Objective) == before


def result(module, row, nll, loads):
    """A result of two texts of each kind, 10 tokens each."""
    texts = module("texts")
    rules = module("table").PINNED
    one = {
        "nll": [nll, nll],
        "tokens": [10, 10],
        "loads": {f"lfu {share}": [loads, loads] for share in module("table").SHARES},
        "pinned": {rule: [4.0, 6.0] for rule in rules},
        "experts": {"sequence": 3.0, "kind": 5.0},
    }
    kinds = ["x", "y"]
    return {
        "row": row,
        "control": "control",
        "seed": 0,
        "kinds": kinds,
        "judged_on": "the same",
        "texts": {kind: one for kind in [*kinds, *texts.UNSEEN, texts.CHANGED]},
        "experts_of_all": 6.0,
    }


def test_price_and_saving_are_over_the_control_of_the_seed(module):
    """.02 nats a token more is 2.02 %; 8 loads in place of 20 are 2.5 times fewer."""
    ours, theirs = result(module, "row", 20.2, 8), result(module, "control", 20.0, 20)
    found = module("table").line("row", {0: ours}, {0: theirs, 1: theirs})
    percent = 100 * (math.exp(0.02) - 1)
    for name in ("all kinds", "unseen kinds", "changing kind"):
        assert found[f"price, {name} (%)"]["mean"] == pytest.approx(percent)
    assert found["highest price of a kind (%)"]["mean"] == pytest.approx(percent)
    assert found["seeds"] == 1 and found["times fewer at 0.25"]["mean"] == pytest.approx(2.5)
    assert found["lfu, a quarter"] == pytest.approx(0.8)
    assert found["pinned: kind"] == pytest.approx(0.5)
    assert found["pinned: first half"] == pytest.approx(1.0)  # counted in half of the tokens


def test_every_row_s_control_is_a_row_without_locality_terms(module):
    """And no two rows have one name."""
    rows = list(module("run").rows())
    known = {row.name: row for row in rows}
    assert len(known) == len(rows)
    for row in rows:
        control = known[row.control]
        assert control.settings(1).is_control
        assert row.settings(1).control().deciding() == control.settings(1).deciding()
