"""Slots and decisions: invariants under any requests, and exact ones worked by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from melinoe.cache.policy import policy
from melinoe.cache.residency import Decision, Load, Residency
from melinoe.errors import CacheTooSmallError, MelinoeError

NUM_EXPERTS = 7


def test_a_request_fills_the_lowest_free_slots_in_order():
    """Three slots, {2,5}, then {1}: slots 0, 1, then 2; then {4} takes the slot of 2."""
    residency = Residency(NUM_EXPERTS, 3)
    assert residency.request([2, 5]) == Decision((), (Load(2, 0, None), Load(5, 1, None)))
    assert residency.request([1]) == Decision((), (Load(1, 2, None),))
    assert residency.request([4, 5]) == Decision((5,), (Load(4, 0, 2),))
    assert residency.expert_of.tolist() == [4, 5, 1]
    assert residency.slot_of.tolist() == [-1, 2, -1, -1, 0, 1, -1]


def test_parts_worked_by_hand():
    """
    Two slots hold {1,4}; the pass needs 0-5 with 4 most used of the missing.

    First the residents; then missing 0, 5 (one use each), then 2 (three) and 3 (nine) stay.
    """
    residency = Residency(NUM_EXPERTS, 2)
    residency.request([1, 4])
    decisions = list(residency.request_in_parts([0, 1, 2, 3, 4, 5], [1, 1, 3, 9, 1, 1]))
    assert decisions == [
        Decision((1, 4), ()),
        Decision((), (Load(0, 0, 1), Load(5, 1, 4))),
        Decision((), (Load(2, 0, 0), Load(3, 1, 5))),
    ]


def test_the_first_part_fills_up_with_the_least_used_missing():
    """By LRU, three slots hold {0,6}; 0-3 needed: 0 and the least used 2, 3 (6 leaves), then 1."""
    residency = Residency(NUM_EXPERTS, 3, "lru")
    residency.request([0, 6])
    decisions = list(residency.request_in_parts([0, 1, 2, 3], [1, 5, 1, 2]))
    assert decisions == [
        Decision((0,), (Load(2, 2, None), Load(3, 1, 6))),
        Decision((), (Load(1, 0, 0),)),
    ]


def test_under_lru_the_most_used_missing_experts_stay_after_a_large_request():
    """Empty, three slots, seven experts with uses 1 to 7: the three most used remain."""
    residency = Residency(NUM_EXPERTS, 3, "lru")
    list(residency.request_in_parts(range(7), [4, 7, 1, 6, 2, 5, 3]))
    assert sorted(residency.expert_of.tolist()) == [1, 3, 5]


def test_a_request_in_parts_is_one_request_to_the_policy():
    """LFU decays once: after {0..6} in four parts of two slots every score is one."""
    lfu = policy("lfu")
    residency = Residency(NUM_EXPERTS, 2, lfu)
    assert len(list(residency.request_in_parts(range(7)))) == 4
    assert lfu.scores() == [1.0] * 7


def test_a_prefetch_drops_what_does_not_fit_and_keeps_the_most_wanted():
    """Two slots: of 5, 3, 1 the first two load; then one miss evicts 3, the less wanted."""
    residency = Residency(NUM_EXPERTS, 2)
    assert residency.prefetch([5, 3, 1]) == Decision((), (Load(5, 0, None), Load(3, 1, None)))
    assert residency.request([0]).loads == (Load(0, 1, 3),)


def test_a_prefetch_never_evicts_what_it_wants_itself():
    """Two slots hold {1,2}; prefetch 0, 1 keeps 1 as a hit and evicts 2."""
    residency = Residency(NUM_EXPERTS, 2)
    residency.request([1, 2])
    assert residency.prefetch([0, 1]) == Decision((1,), (Load(0, 1, 2),))


def test_a_prefetch_is_no_request_to_belady():
    """Its future stays aligned: the first request after a prefetch is request 0."""
    residency = Residency(3, 1, policy("belady", future=[[0], [1]]))
    residency.prefetch([2])
    assert residency.request([0]).loads == (Load(0, 0, 2),)


def test_reset_empties_in_place():
    """The arrays stay the same objects, the policy forgets, and slots fill from 0 again."""
    residency = Residency(NUM_EXPERTS, 2, "lfu")
    slot_of, expert_of = residency.slot_of, residency.expert_of
    residency.request([3, 4])
    residency.reset()
    assert residency.slot_of is slot_of and (slot_of == -1).all()
    assert residency.expert_of is expert_of and (expert_of == -1).all()
    assert residency.policy.scores() == [0.0] * NUM_EXPERTS
    assert residency.request([6]).loads == (Load(6, 0, None),)


def test_too_many_experts_for_one_request_change_nothing():
    """The error says how many slots would do; the slots are as before."""
    residency = Residency(NUM_EXPERTS, 2)
    residency.request([0, 1])
    with pytest.raises(CacheTooSmallError, match="needs 3 experts of a layer that has 2 slots"):
        residency.request([2, 3, 4])
    assert residency.expert_of.tolist() == [0, 1]
    residency.check_invariants()


@pytest.mark.parametrize("bad", [[-1], [7], [2, 2], [0, 1, 2, 3, 3]])
@pytest.mark.parametrize("call", ["request", "request_in_parts", "prefetch"])
def test_ids_out_of_range_or_twice_change_nothing(bad, call):
    """A caller's mistake is a ValueError, before anything moves."""
    residency = Residency(NUM_EXPERTS, 6)
    with pytest.raises(ValueError, match="a request names an expert"):
        getattr(residency, call)(bad)
    assert len(residency) == 0
    residency.check_invariants()


@pytest.mark.parametrize(
    ("slots", "text"), [(0, "at least 1"), (-3, "at least 1"), (8, "at most 7")]
)
def test_impossible_capacities_are_refused(slots, text):
    """No slot, or more than there are experts."""
    with pytest.raises(MelinoeError, match=text):
        Residency(NUM_EXPERTS, slots)


def test_arrays_do_as_well_as_lists():
    """numpy ids give decisions of the same plain integers."""
    ours, theirs = Residency(NUM_EXPERTS, 2), Residency(NUM_EXPERTS, 2)
    for request in ([1, 2], [2, 3], [0, 1, 2, 3, 4]):
        array = np.array(request)
        decisions = list(ours.request_in_parts(array, np.ones(len(array), dtype=np.int64)))
        assert decisions == list(theirs.request_in_parts(request))
        assert all(type(e) is int for decision in decisions for e in decision.hits)
        assert all(type(load.expert) is int for decision in decisions for load in decision.loads)


requests = st.lists(
    st.tuples(
        st.sampled_from(["request", "prefetch", "reset"]),
        st.dictionaries(st.integers(0, NUM_EXPERTS - 1), st.integers(1, 9)),
    ),
    min_size=4,
    max_size=25,
)


@given(
    st.integers(1, NUM_EXPERTS),
    st.sampled_from(["lru", "lfu"]),
    requests,
)
def test_decisions_cover_each_request_once_and_never_evict_what_they_need(capacity, name, steps):
    """Any requests, prefetches and resets: views agree, residents come first, parts are exact."""
    residency = Residency(NUM_EXPERTS, capacity, name)
    for step, use_counts in steps:
        before = {e for e in range(NUM_EXPERTS) if e in residency}
        experts = sorted(use_counts)
        if step == "reset":
            residency.reset()
            assert len(residency) == 0
        elif step == "prefetch":
            decision = residency.prefetch(experts)
            assert set(decision.hits) | {load.expert for load in decision.loads} == set(
                experts[:capacity]
            )
            assert all(e in residency for e in experts[:capacity])
        else:
            covered = []
            for number, decision in enumerate(
                residency.request_in_parts(experts, [use_counts[e] for e in experts])
            ):
                served = [*decision.hits, *(load.expert for load in decision.loads)]
                covered += served
                assert len(served) <= capacity
                assert set(decision.hits) == (before & set(experts) if number == 0 else set())
                for load in decision.loads:
                    assert load.evicted not in served
                    assert residency.slot_of[load.expert] == load.slot
                assert all(e in residency for e in served)
                residency.check_invariants()
            assert sorted(covered) == experts
        residency.check_invariants()
        resident = {e for e in range(NUM_EXPERTS) if e in residency}
        # A slot is given up only for a load: what was there and left made room for another.
        assert step == "reset" or len(resident) >= len(before)


def test_part_of_a_request_is_loaded_and_the_rest_left_where_it_is():
    """
    Two of three slots hold 0 and 1; {1,2,3,4} with uses 1,3,1,2 and two loads at most.

    Missing by uses: 3, 4, 2. The two most used, 4 and 2, come: one into the free slot, one over 0,
    since 1 is needed. 3 is computed elsewhere, though four experts would not have fitted.
    """
    residency = Residency(5, 3)
    residency.request([0])
    residency.request([1])
    decision, on_host = residency.request_with_host(
        [1, 2, 3, 4], [1, 3, 1, 2], load=lambda missing: 2
    )
    assert decision == Decision((1,), (Load(4, 2, None), Load(2, 0, 0))) and on_host == (3,)
    residency.check_invariants()


def test_nothing_is_loaded_where_nothing_may_be():
    """With no loads the residents stay as prefetched, whatever is asked; all loads is a request."""
    residency, usual = Residency(5, 2), Residency(5, 2)
    for one in (residency, usual):
        one.prefetch([0, 1])
    assert residency.request_with_host([0, 3, 4], load=lambda missing: 0) == (
        Decision((0,), ()),
        (3, 4),
    )
    assert residency.request_with_host([], load=lambda missing: 9) == (Decision((), ()), ())
    usual.policy.use([0, 3, 4])  # what the other one's has heard
    for request in ([0, 3], [2], [1, 4], [0, 4]):
        decision, on_host = residency.request_with_host(request, load=len)
        assert not on_host
        assert decision == usual.request(request)


def test_no_more_is_loaded_than_slots_beside_the_hits():
    """Two slots, one hit: one load, however many are allowed."""
    residency = Residency(5, 2)
    residency.request([0])
    decision, on_host = residency.request_with_host([0, 1, 2, 3], load=len)
    assert [load.expert for load in decision.loads] == [3] and on_host == (1, 2)


def test_the_rule_of_loads_is_told_the_uses_of_what_is_missing():
    """0 is there; 1, 2 and 3 are missing with 4, 1 and 2 uses: ascending, and ones if not said."""
    told = []
    for uses in ([9, 4, 1, 2], None):
        residency = Residency(5, 2)
        residency.request([0])
        residency.request_with_host(
            [0, 1, 2, 3], uses, load=lambda uses: told.append(list(uses)) or 0
        )
    assert told == [[1, 2, 4], [1, 1, 1]]
