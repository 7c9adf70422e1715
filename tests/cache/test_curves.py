"""Miss-ratio curves and what is made of them: one pass against one replay per size."""

import itertools

import numpy as np
import pytest
from cache_traces import random_trace, trace_of
from trace_builder import TraceBuilder

from melinoe.cache.curves import allocate, miss_curves, unit_costs
from melinoe.cache.residency import Residency
from melinoe.cache.simulator import simulate
from melinoe.errors import BudgetError, MelinoeError


def replayed(trace, policy, **settings):
    """Loads of one simulation per size, (2, layers, experts)."""
    runs = [
        simulate(trace, slots, policy, engine="residency", **settings).counters
        for slots in range(1, trace.num_experts + 1)
    ]
    return np.stack([run.loads for run in runs], -1)


@pytest.mark.parametrize("policy", ["lru", "lfu", "static", "belady"])
@pytest.mark.parametrize("seed", range(12))
def test_the_curve_equals_a_replay_for_each_size(policy, seed):
    """Decoding alone and prompts, batches, absent experts, resets: every size, phase and layer."""
    rng = np.random.default_rng(seed)
    trace = random_trace(
        seed,
        num_experts=int(rng.integers(5, 14)),
        top_k=int(rng.integers(1, 5)),
        prompt=int(rng.integers(1, 4)),
        completion=30,
        batch=1 + seed % 2,
    )
    settings = {"reset_between_sequences": bool(seed % 3)}
    loads = miss_curves(trace, policy, **settings)
    assert (loads == replayed(trace, policy, **settings)).all()


@pytest.mark.parametrize("policy", ["lru", "lfu", "static", "belady"])
def test_where_requests_fit_nothing_is_simulated(policy, monkeypatch):
    """Requests of two experts: only one slot needs a replay, and more slots never load more."""
    trace = random_trace(0, prompt=1, completion=60)
    sizes = []
    monkeypatch.setattr(
        "melinoe.cache.curves.simulate",
        lambda trace, slots, *a, **k: sizes.append(slots) or simulate(trace, slots, *a, **k),
    )
    loads = miss_curves(trace, policy)
    assert sizes == [1] and loads.shape == (2, 2, 8)
    assert (np.diff(loads[:, :, 1:], axis=2) <= 0).all()


@pytest.mark.parametrize("policy", ["lru", "lfu", "static", "belady"])
def test_costs_of_all_sizes_that_hold_a_request_take_one_pass(policy, monkeypatch):
    """Decoding alone, as in a long trace: no size of two slots or more is replayed."""
    trace = random_trace(0, prompt=1, completion=60)
    sizes, told = [], []
    monkeypatch.setattr("melinoe.cache.curves.COMPILED_FROM", 0)
    monkeypatch.setattr(
        "melinoe.cache.curves.simulate",
        lambda trace, slots, *a, **k: sizes.append(slots) or simulate(trace, slots, *a, **k),
    )
    unit_costs(trace, range(1, 9), policy, progress=lambda: told.append(len(sizes)))
    assert sizes == [1] and told == [1] * 8


def test_lru_distances_worked_by_hand():
    """
    {0,1} {2} {0} {3} {0,2} at top-2, one layer.

    2 is new; 0 lies third behind 2 and 1 (1 was stamped after 0), so it hits from 3 slots on; 3 is
    new; then 0 is second (behind 3), and 2 third. Loads with 2 slots: 2+1+1+1+1; with 3 or 4:
    2+1+0+1+0.
    """
    trace = trace_of([[0, 1]], [[2, -1]], [[0, -1]], [[3, -1]], [[0, 2]], num_experts=4, top_k=2)
    assert miss_curves(trace, "lru")[1, 0].tolist() == [7, 6, 4, 4]
    costs = unit_costs(trace, (2, 3, 4), "lru")
    assert costs.hits[:, 0].tolist() == [1, 3, 3] and costs.loads[:, 0].tolist() == [6, 4, 4]


def test_inclusion_fails_once_a_request_comes_in_parts():
    """
    {3,4} then {1,2,3} under LRU: one slot ends with 3, two slots without it.

    One slot serves 1, 2, 3 in turn. Two slots hold 3 already, serve it first with 1, and then give
    its place to 2. So the curve of small sizes cannot be read off one stack.
    """
    held = []
    for slots in (1, 2):
        residency = Residency(5, slots, "lru")
        for request in ([3, 4], [1, 2, 3]):
            list(residency.request_in_parts(request))
        held.append({expert for expert in range(5) if expert in residency})
    assert held == [{3}, {1, 2}]


def test_other_policies_are_replayed_once_per_size():
    """A rule given as a function has a curve too, the same as by name."""
    from melinoe.cache.policy import DecayedLFU

    trace = random_trace(4)
    assert (miss_curves(trace, DecayedLFU) == miss_curves(trace, "lfu")).all()


@pytest.mark.parametrize("policy", ["lru", "lfu", "static", "belady"])
@pytest.mark.parametrize("seed", range(4))
def test_costs_of_each_sequence_equal_replays(policy, seed, monkeypatch):
    """One pass for all sizes that hold the largest request, compiled or not: the same counts."""
    trace = random_trace(seed, prompt=2, completion=20, batch=1 + seed % 2)
    cold = seed < 2
    sizes = list(range(1, 9))
    for least in (0, 10**9):
        monkeypatch.setattr("melinoe.cache.curves.COMPILED_FROM", least)
        found = unit_costs(trace, sizes, policy, reset_between_sequences=cold)
        for at, slots in enumerate(sizes):
            each = simulate(
                trace, slots, policy, engine="residency", reset_between_sequences=cold
            ).per_sequence
            assert found.hits[at].tolist() == [one.hits[1].sum() for one in each]
            assert found.loads[at].tolist() == [one.loads[1].sum() for one in each]
            assert found.uses.tolist() == [one.uses[1].sum() for one in each]
            assert found.tokens.tolist() == [one.tokens[1] for one in each]
    with pytest.raises(MelinoeError, match="at most 8"):
        unit_costs(trace, [4, 9], policy)


# --- allocation -----------------------------------------------------------------------------------


def total_cost(cost, split):
    """Cost of a split: the sum over layers."""
    return sum(cost[layer, slots - 1] for layer, slots in enumerate(split))


def uniform(layers, budget):
    """Equal slots of each layer, what does not divide to the first."""
    return np.full(layers, budget // layers) + (np.arange(layers) < budget % layers)


def best_by_search(cost, budget, at_least):
    """Least cost over every split, tried one by one."""
    layers, experts = cost.shape
    splits = itertools.product(range(at_least, experts + 1), repeat=layers)
    return min(total_cost(cost, split) for split in splits if sum(split) <= budget)


@pytest.mark.parametrize("seed", range(60))
def test_the_exact_split_costs_the_least_possible(seed):
    """On curves of any shape, convex or not, rising even: exhaustive search finds nothing less."""
    rng = np.random.default_rng(seed)
    layers, experts = int(rng.integers(1, 4)), int(rng.integers(2, 7))
    cost = rng.integers(0, 30, (layers, experts))
    if seed % 2:
        cost = np.sort(cost, axis=1)[:, ::-1]
    at_least = int(rng.integers(1, 3))
    budget = int(rng.integers(layers * at_least, layers * experts + 3))
    split = allocate(cost, budget, at_least=at_least)
    assert sum(split) <= budget and min(split) >= at_least and max(split) <= experts
    assert total_cost(cost, split) == best_by_search(cost, budget, at_least)


def test_a_split_from_a_trace_costs_what_it_promised():
    """Layer 1 goes round six experts, layer 0 uses one: 8 slots split 1 to 6, not 4 to 4."""
    rows = [[[0], [step % 6]] for step in range(60)]
    builder = TraceBuilder(2, 8, 1)
    for row in rows:
        builder.add_forward([row], 0, 1)
    trace = builder.trace()
    cost = miss_curves(trace, "lru")[1]
    split = allocate(cost, 8)
    assert total_cost(cost, split) == 1 + 6
    assert simulate(trace, split).counters.loads.sum() == 1 + 6
    assert simulate(trace, 4).counters.loads.sum() == 1 + 60


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_no_uniform_split_beats_the_allocated_one(policy):
    """On the trace it was made from, for every budget, prompts included."""
    trace = random_trace(8, layers=3, completion=30)
    cost = miss_curves(trace, policy).sum(axis=0)
    for budget in (6, 9, 14):
        split = allocate(cost, budget)
        mine = simulate(trace, split, policy).counters.loads.sum()
        assert mine == total_cost(cost, split)
        assert mine <= simulate(trace, uniform(3, budget), policy).counters.loads.sum()


def test_impossible_budgets_are_refused():
    """Fewer slots than layers need: the message has the smallest budget that works."""
    cost = np.zeros((3, 4))
    with pytest.raises(BudgetError, match="at least 6"):
        allocate(cost, 5, at_least=2)
    with pytest.raises(ValueError, match="at_least"):
        allocate(cost, 50, at_least=5)
    assert allocate(cost, 100) == (4, 4, 4)
