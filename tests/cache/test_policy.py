"""Each policy by hand and searched exhaustively, and policies by name."""

import itertools
import math
import textwrap
from pathlib import Path

import numpy as np
import pytest
from cache_traces import random_trace, trace_of

from melinoe import config
from melinoe.cache import policy as policies
from melinoe.cache.policy import (
    LRU,
    Belady,
    DecayedLFU,
    Policy,
    Static,
    policy,
    policy_class,
    policy_makers,
    register,
    servable_names,
)
from melinoe.cache.residency import Residency
from melinoe.cache.simulator import simulate
from melinoe.errors import MelinoeError


def evictions(residency, requests):
    """Who left, request by request."""
    decisions = [residency.request(experts) for experts in requests]
    return [
        [load.evicted for load in decision.loads if load.evicted is not None]
        for decision in decisions
    ]


def test_lru_evicts_the_longest_unused_expert():
    """Two slots, requests {0} {1} {0} {2}: 2 takes the slot of 1, because 0 was used since."""
    assert evictions(Residency(3, 2, LRU()), [[0], [1], [0], [2]]) == [[], [], [], [1]]


def test_lru_breaks_ties_of_one_request_by_the_lower_id():
    """Three slots hold {1,4,5} from one request; {0} evicts 1, {2} evicts 4."""
    assert evictions(Residency(6, 3), [[1, 4, 5], [0], [2]]) == [[], [1], [4]]


def test_lfu_keeps_the_frequent_where_lru_keeps_the_recent():
    """0 twice, then 1, then 2 into two slots: LFU evicts 1 (1 < 0.9 + 0.81), LRU evicts 0."""
    requests = [[0], [0], [1], [2]]
    assert evictions(Residency(3, 2, "lfu"), requests)[-1] == [1]
    assert evictions(Residency(3, 2, "lru"), requests)[-1] == [0]


def test_lfu_scores_worked_by_hand():
    """Gamma 0.5, {0} {0,1} {1}: scores (0.25 + 0.5, 0.5 + 1, 0), whoever is resident."""
    lfu = DecayedLFU(0.5)
    lfu.reset(3)
    for request in ([0], [0, 1], [1]):
        lfu.use(request)
    assert lfu.scores() == [0.75, 1.5, 0.0]


def test_lfu_remembers_the_evicted():
    """One slot, {0} {0} {1}, gamma 0.5: 0 is gone, and its score of 0.75 is not."""
    lfu = DecayedLFU(0.5)
    residency = Residency(3, 1, lfu)
    evictions(residency, [[0], [0], [1]])
    assert 0 not in residency
    assert lfu.scores() == [0.75, 1.0, 0.0]


@pytest.mark.parametrize("gamma", [0.01, 0.5, 0.9, 0.999, 1.0])
def test_lfu_in_a_growing_unit_equals_decaying_every_score(gamma):
    """Over 6,000 requests, through many rescalings, scores follow the recurrence as written."""
    rng = np.random.default_rng(0)
    lfu = DecayedLFU(gamma)
    lfu.reset(8)
    literal = np.zeros(8)
    for _ in range(6000):
        used = np.flatnonzero(rng.random(8) < 0.3)
        lfu.use(used.tolist())
        literal = gamma * literal
        literal[used] += 1
    assert np.allclose(lfu.scores(), literal, rtol=1e-11)
    assert all(math.isfinite(score) for score in lfu._rank)


def test_lfu_rescaling_changes_no_choice():
    """Right before and after the unit is rescaled, the order of the scores is the same."""
    lfu = DecayedLFU(0.001)
    lfu.reset(3)
    orders = []
    for step in range(200):
        lfu.use([step % 2])
        orders.append(lfu.victims([0, 1, 2], 3))
    assert orders[4:] == [[2, 1 - step % 2, step % 2] for step in range(4, 200)]


@pytest.mark.parametrize("gamma", [0, -1, 1.01, math.nan])
def test_lfu_refuses_an_impossible_decay(gamma):
    """Zero or negative would forget everything, above one would prefer the past."""
    with pytest.raises(ValueError, match="gamma"):
        DecayedLFU(gamma)


def test_belady_evicts_the_furthest_next_use():
    """{0} {1} {2} {0} {1}, two slots: at 2, expert 1 leaves (needed later than 0)."""
    future = [[0], [1], [2], [0], [1]]
    assert evictions(Residency(3, 2, Belady(future)), future) == [[], [], [1], [], [0]]


def test_belady_refuses_requests_it_was_not_promised():
    """A bound computed on other requests than those served would be no bound."""
    residency = Residency(3, 2, Belady([[0], [1]]))
    residency.request([0])
    with pytest.raises(ValueError, match="did not promise"):
        residency.request([2])


def fewest_loads(requests, slots):
    """Least demand loads over all choices of victims, by trying every one."""
    states = {frozenset(): 0}
    for request in map(frozenset, requests):
        after = {}
        for resident, cost in states.items():
            cost += len(request - resident)
            others = sorted(resident - request)
            keep = min(len(others), slots - len(request))
            # Keeping fewer can never help, so every choice keeps as many as fit.
            for kept in itertools.combinations(others, keep):
                state = request | frozenset(kept)
                after[state] = min(after.get(state, cost), cost)
        states = after
    return min(states.values())


@pytest.mark.parametrize("seed", range(100))
def test_belady_makes_the_fewest_loads_possible(seed):
    """On small random traces Belady equals exhaustive search, and no other policy beats it."""
    rng = np.random.default_rng(seed)
    num_experts, top_k = int(rng.integers(4, 8)), int(rng.integers(1, 4))
    slots = int(rng.integers(top_k, num_experts))
    rows = [[rng.permutation(num_experts)[:top_k].tolist()] for _ in range(14)]
    trace = trace_of(*rows, num_experts=num_experts, top_k=top_k)
    loads = {
        name: simulate(trace, slots, name).counters.loads.sum() for name in ("belady", "lru", "lfu")
    }
    assert loads["belady"] == fewest_loads([row[0] for row in rows], slots)
    assert loads["belady"] == min(loads.values())


@pytest.mark.parametrize("seed", range(20))
def test_no_policy_beats_belady_when_requests_come_in_parts(seed):
    """Passes of several rows need more experts than slots; the bound still holds."""
    rng = np.random.default_rng(seed)
    rows = [[rng.permutation(7)[:2].tolist() for _ in range(rng.integers(1, 5))] for _ in range(25)]
    trace = trace_of(*rows, num_experts=7, top_k=2)
    loads = {name: simulate(trace, 3, name).counters for name in ("belady", "lru", "lfu")}
    assert loads["belady"].chunked.sum() > 0
    assert loads["belady"].loads.sum() <= min(c.loads.sum() for c in loads.values())


def test_an_unknown_policy_is_refused_with_the_known_ones():
    """The message is the list to choose from."""
    with pytest.raises(MelinoeError, match="'fifo'; choose one of lru, lfu, s"):
        policy("fifo")


def test_belady_cannot_run_a_model():
    """Without the future it is refused, and the way out named."""
    with pytest.raises(MelinoeError, match="simulator"):
        policy("belady")


def test_a_policy_from_outside_can_be_registered(monkeypatch):
    """A small class with a name is usable by that name; the same name twice is refused."""
    monkeypatch.setattr("melinoe.cache.policy._known", dict(policies._known))

    @register
    class Mru(Policy):
        name = "mru"

        def reset(self, num_experts):
            self.last = []

        def use(self, experts):
            self.last = [e for e in self.last if e not in experts] + list(experts)

        def victims(self, candidates, count):
            return sorted(candidates, key=self.last.index, reverse=True)[:count]

    assert "mru" in servable_names()
    assert evictions(Residency(3, 2, "mru"), [[0], [1], [2]]) == [[], [], [1]]
    with pytest.raises(ValueError, match="a name of its own"):
        register(Mru)


def test_static_gives_up_the_unpopular_however_recent():
    """Popularity 5, 1, 3: after {0} {2} {1}, 1 took the slot of 2, and is itself next to go."""
    residency = Residency(3, 2, Static([5, 1, 3]))
    evicted = [load.evicted for e in (0, 2, 1, 2) for load in residency.request([e]).loads]
    assert evicted == [None, None, 2, 1]


def test_static_counts_popularity_in_the_trace_unless_told():
    """0 twice and 1 once here; told the opposite, the other one stays."""
    trace = trace_of([[0]], [[1]], [[0]], [[2]], [[0]], num_experts=3, top_k=1)
    assert simulate(trace, 2, "static").counters.loads.sum() == 3
    told = simulate(trace, 2, "static", policy_options={"popularity": [[0, 9, 5]]})
    assert told.counters.loads.sum() == 4


def test_static_wants_a_popularity_for_every_layer_and_expert():
    """One row for two layers, or two numbers for eight experts: refused."""
    trace = random_trace(0)
    with pytest.raises(MelinoeError, match="all 2 layers"):
        simulate(trace, 3, "static", policy_options={"popularity": [[1] * 8]})
    for engine in ("residency", "compiled"):
        with pytest.raises(ValueError, match="2 experts of 8"):
            simulate(trace, 3, "static", policy_options={"popularity": [[1, 2]] * 2}, engine=engine)


def test_options_of_a_policy_reach_it():
    """Made by name for a layer, options and all; unknown ones are a caller's mistake."""
    (make,) = policy_makers("lfu", {"gamma": 0.5}, 1)
    made = make()
    assert isinstance(made, DecayedLFU) and made.gamma == 0.5
    (make,) = policy_makers("belady", {"future": [[[0]]]}, 1)
    assert isinstance(make(), Belady)
    with pytest.raises(TypeError):
        policy_makers("lru", {"gamma": 0.5}, 1)[0]()


def test_the_settings_name_ours_that_run_a_model_by_name_alone():
    """Of the built-in policies, exactly those that need no future and no data."""
    able = []
    for name in ("belady", "lfu", "lru", "static"):
        cls = policy_class(name)
        assert cls.name == name
        if cls.offline:
            continue
        try:
            cls.for_layer(0, 1)
        except (MelinoeError, TypeError):
            continue
        able.append(name)
    assert sorted(config.policies()) == able


def test_the_policy_on_the_page_of_traces_works(monkeypatch):
    """The class printed in docs/traces.md, run as it stands: it gives up the expert used last."""
    page = (Path(__file__).parents[2] / "docs" / "traces.md").read_text()
    block = page[page.index("    from melinoe.cache.policy import Policy") :]
    code = textwrap.dedent(block[: block.index("\n`register`")])
    monkeypatch.setattr("melinoe.cache.policy._known", dict(policies._known))
    exec(code, {})
    trace = trace_of([[0]], [[1]], [[2]], [[0]], num_experts=3, top_k=1)
    assert "mru" in config.policies()
    assert simulate(trace, 2, "mru").counters.loads.sum() == 3
