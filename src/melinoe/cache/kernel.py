"""
Replay long traces by compiled code, which decides as `Residency` does.

A built-in policy is a number here, its place in `COMPILED_POLICIES`; its rule is the function of
`melinoe.cache.policy` itself, compiled. Every expert has a float64 *rank*, the lowest leaves, of
equal ones the lowest id; experts needed together carry the same *mark*. Import it only when used:
numba takes a second to load. Compiled code is kept on disk beside its file, or in
``NUMBA_CACHE_DIR``.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import numba
import numpy as np

from melinoe.cache import policy as policies
from melinoe.cache.locality import popularity
from melinoe.cache.policy import COMPILED_POLICIES, policy_class
from melinoe.cache.trace import Trace

RULES = {name: number for number, name in enumerate(COMPILED_POLICIES)}
LRU, LFU, STATIC, BELADY = RULES.values()

# Compiled code is kept by the time of its own file alone. As the default of an argument this is
# part of what it is kept by, so that a change here or in the rules compiles it anew.
STAMP = crc32(Path(__file__).read_bytes(), crc32(Path(policies.__file__).read_bytes()))


def compiled(function: Callable[..., Any]) -> Any:
    """Compile *function* when it is first called, or take what was kept of an earlier process."""
    try:
        return numba.njit(cache=True, boundscheck=False)(function)
    except RuntimeError:  # nowhere to keep the result: compile anew in each process
        return numba.njit(boundscheck=False)(function)


_note_lru, _note_lfu = compiled(policies.note_lru), compiled(policies.note_lfu)


# --- a request, in the parts that both loops share ------------------------------------------------


@compiled
def workspace(experts, num_experts, rule):  # type: ignore[no-untyped-def]
    """Make the arrays of a loop: ids, uses, places, next requests, ranks, the future."""
    rows = experts.shape[0] if rule == BELADY else 0
    return (
        np.empty(num_experts, np.int64),
        np.zeros(num_experts, np.int64),
        np.empty(num_experts, np.int64),
        np.zeros(num_experts, np.int64),
        np.zeros(num_experts, np.float64),
        np.empty((rows, experts.shape[2]), np.int64),
    )


@compiled
def begin(rule, experts, bounds, layer, popularity, rank, following, upcoming):  # type: ignore[no-untyped-def]
    """Give a layer's experts the ranks that do not come from the past."""
    if rule == STATIC:
        rank[:] = popularity[layer]
    elif rule == BELADY:
        # For each choice, find the pass that next requests its expert; leave each expert's first.
        following[:] = len(bounds)
        for step in range(len(bounds) - 2, -1, -1):
            for row in range(bounds[step], bounds[step + 1]):
                for k in range(experts.shape[2]):
                    if experts[row, layer, k] >= 0:
                        upcoming[row, k] = following[experts[row, layer, k]]
            for row in range(bounds[step], bounds[step + 1]):
                for k in range(experts.shape[2]):
                    if experts[row, layer, k] >= 0:
                        following[experts[row, layer, k]] = step


@compiled
def forget(rule, rank, place):  # type: ignore[no-untyped-def]
    """Empty the slots and forget all requests; returns *now*. Popularity and the future stay."""
    place[:] = -1
    if rule != STATIC and rule != BELADY:
        rank[:] = 0.0
    return 1.0 if rule == LFU else 0.0


@compiled
def use(rule, order, found, rank, now, gamma, following):  # type: ignore[no-untyped-def]
    """Tell the rule of one request, served as ``order[:found]``; returns the new *now*."""
    if rule == LRU:
        return _note_lru(order[:found], rank, now, gamma)
    if rule == LFU:
        return _note_lfu(order[:found], rank, now, gamma)
    if rule == BELADY:
        for i in range(found):
            rank[order[i]] = -following[order[i]]
    return now


@compiled
def admit(missing, first, end, resident, place, filled, capacity, mark, step, rank):  # type: ignore[no-untyped-def]
    """Give slots to ``missing[first:end]``, evicting nobody marked *step*; returns slots in use."""
    for i in range(first, end):
        slot = filled
        if filled < capacity:
            filled += 1
        else:
            victim = -1
            for j in range(filled):
                expert = resident[j]
                if mark[expert] == step:
                    continue
                if (
                    victim < 0
                    or rank[expert] < rank[victim]
                    or (rank[expert] == rank[victim] and expert < victim)
                ):
                    victim = expert
            slot = place[victim]
            place[victim] = -1
        resident[slot] = missing[i]
        place[missing[i]] = slot
    return filled


@compiled
def least_used_first(missing, absent, count):  # type: ignore[no-untyped-def]
    """Sort ``missing[:absent]``, ascending, by uses; of equally used ones the lowest id first."""
    for i in range(1, absent):
        expert = missing[i]
        j = i - 1
        while j >= 0 and count[missing[j]] > count[expert]:
            missing[j + 1] = missing[j]
            j -= 1
        missing[j + 1] = expert


@compiled
def distinct(experts, low, high, layer, ids, count, following, upcoming):  # type: ignore[no-untyped-def]
    """Collect the experts of rows *low* to *high*, ascending, and their uses; returns how many."""
    found = 0
    for row in range(low, high):
        for k in range(experts.shape[2]):
            expert = experts[row, layer, k]
            if expert >= 0:
                if count[expert] == 0:
                    ids[found] = expert
                    found += 1
                count[expert] += 1
                if len(upcoming):
                    following[expert] = upcoming[row, k]
    if found > 24:
        found = 0
        for expert in range(len(count)):
            if count[expert]:
                ids[found] = expert
                found += 1
        return found
    for i in range(1, found):  # insertion sort
        expert = ids[i]
        j = i - 1
        while j >= 0 and ids[j] > expert:
            ids[j + 1] = ids[j]
            j -= 1
        ids[j + 1] = expert
    return found


# --- one number of slots --------------------------------------------------------------------------


@compiled
def replay(  # type: ignore[no-untyped-def]
    experts, bounds, phase, unit_of, resets, slots, num_experts, rule, gamma, popularity,
    counts, waited, loads_of, experts_of, stamp=STAMP,
):  # fmt: skip
    """
    Replay all layers, one after the other.

    From *experts* int16 (rows, layers, top_k), *bounds*, where each pass's rows begin, *phase*,
    *unit_of* and *resets* by pass, *slots* by layer. Filled: *counts* int64 (units, 2, 5, layers),
    uses, hits, loads, requests, chunked; *waited* int64 (passes,), loads of all layers; *loads_of*
    and *experts_of* int32 (passes, layers) unless empty.
    """
    ids, count, place, following, rank, upcoming = workspace(experts, num_experts, rule)
    order = np.empty(num_experts, np.int64)
    missing = np.empty(num_experts, np.int64)
    resident = np.empty(num_experts, np.int64)
    mark = np.zeros(num_experts, np.int64)
    mine = 0
    for layer in range(experts.shape[1]):
        capacity = slots[layer]
        begin(rule, experts, bounds, layer, popularity, rank, following, upcoming)
        now, filled = forget(rule, rank, place), 0
        for step in range(len(bounds) - 1):
            if resets[step]:
                now, filled = forget(rule, rank, place), 0
            found = distinct(
                experts, bounds[step], bounds[step + 1], layer, ids, count, following, upcoming
            )
            if found == 0:
                continue
            present, absent, uses, hits = 0, 0, 0, 0
            for i in range(found):
                expert = ids[i]
                uses += count[expert]
                if place[expert] >= 0:
                    hits += count[expert]
                    order[present] = expert
                    present += 1
                else:
                    missing[absent] = expert
                    absent += 1
            fits = found <= capacity
            if not fits:
                least_used_first(missing, absent, count)
            for i in range(absent):
                order[present + i] = missing[i]
            served = ids if fits else order
            now = use(rule, served, found, rank, now, gamma, following)
            mine += 1
            for i in range(found if fits else present):
                mark[served[i]] = mine
            low, high = 0, min(absent, capacity - present)
            while low < absent:
                for i in range(low, high):
                    mark[missing[i]] = mine
                filled = admit(
                    missing, low, high, resident, place, filled, capacity, mark, mine, rank
                )
                low, high = high, min(high + capacity, absent)
                mine += 1
            own = counts[unit_of[step], phase[step]]
            own[0, layer] += uses
            own[1, layer] += hits
            own[2, layer] += absent
            own[3, layer] += 1
            own[4, layer] += not fits
            waited[step] += absent
            if len(loads_of):
                loads_of[step, layer] = absent
                experts_of[step, layer] = found
            for i in range(found):
                count[ids[i]] = 0


# --- all numbers of slots in one pass -------------------------------------------------------------


@compiled
def distances(  # type: ignore[no-untyped-def]
    experts, bounds, group, resets, num_experts, rule, gamma, popularity, loads_at, uses_at,
    largest, stamp=STAMP,
):  # fmt: skip
    """
    Find the least slots with which each request's experts would have been resident.

    A stack holds every expert seen: a cache of C slots holds the first C of it. A request of n
    experts puts them first; after them each place takes the best of those that a cache so large
    held and that has not found one yet. Filled: *loads_at* and *uses_at* int64 (groups, layers,
    num_experts + 1) by distance - 1, the last column "never before"; *largest* int64 (layers,).
    """
    ids, count, place, following, rank, upcoming = workspace(experts, num_experts, rule)
    stack = np.empty(num_experts, np.int64)
    after = np.empty(num_experts, np.int64)
    pool = np.empty(num_experts, np.int64)
    for layer in range(experts.shape[1]):
        at_layer = layer if loads_at.shape[1] > 1 else 0
        begin(rule, experts, bounds, layer, popularity, rank, following, upcoming)
        now, depth = forget(rule, rank, place), 0
        for step in range(len(bounds) - 1):
            if resets[step]:
                now, depth = forget(rule, rank, place), 0
            found = distinct(
                experts, bounds[step], bounds[step + 1], layer, ids, count, following, upcoming
            )
            if found == 0:
                continue
            largest[layer] = max(largest[layer], found)
            for i in range(found):
                at = place[ids[i]]
                distance = at if at >= 0 else num_experts
                loads_at[group[step], at_layer, distance] += 1
                uses_at[group[step], at_layer, distance] += count[ids[i]]
            now = use(rule, ids, found, rank, now, gamma, following)

            for i in range(found):
                after[i] = ids[i]
            waiting, seen, filled = 0, 0, found
            while seen < depth or waiting:
                # Those that a cache of filled + 1 slots held, and no smaller one has kept.
                while seen < min(filled + 1, depth):
                    if count[stack[seen]] == 0:
                        pool[waiting] = stack[seen]
                        waiting += 1
                    seen += 1
                if waiting == 0:
                    break
                best = 0
                for i in range(1, waiting):
                    one, other = pool[i], pool[best]
                    if rank[one] > rank[other] or (rank[one] == rank[other] and one > other):
                        best = i
                after[filled] = pool[best]
                filled += 1
                waiting -= 1
                pool[best] = pool[waiting]
            depth = filled
            for i in range(depth):
                stack[i] = after[i]
                place[after[i]] = i
            for i in range(found):
                count[ids[i]] = 0


# --- from a trace to arrays ----------------------------------------------------------------------


class Prepared:
    """A trace and a policy, by name, as the compiled loops take them; figures are by pass."""

    def __init__(
        self, trace: Trace, policy: str, options: Mapping[str, Any], reset_between_sequences: bool
    ) -> None:
        self._trace = trace
        self._bounds, self.phase = trace.bounds()
        self.tokens = np.diff(self._bounds)
        self.units, self.unit, begins = trace.unit_of_passes()
        self._resets = begins if reset_between_sequences else np.zeros_like(begins)
        cls, layers = policy_class(policy), trace.num_layers
        popular, gamma = np.zeros((layers, trace.num_experts)), 1.0
        if policy == "static":
            options = {"popularity": popularity(trace), **options}
            for layer in range(layers):
                cls.for_layer(layer, layers, **options).reset(trace.num_experts)
            popular = np.asarray(options["popularity"], np.float64).reshape(popular.shape)
        elif not cls.offline:
            gamma = float(cls.for_layer(0, 1, **options).gamma)  # type: ignore[attr-defined]
        self._rule = (RULES[policy], gamma, popular)

    def replay(self, slots: Sequence[int], steps: bool) -> tuple[np.ndarray, ...]:
        """Replay with *slots* of each layer; counts, waited, loads_of, experts_of of `replay`."""
        trace, passes = self._trace, len(self.phase)
        detailed = (passes if steps else 0, trace.num_layers)
        found = (
            np.zeros((len(self.units), 2, 5, trace.num_layers), np.int64),
            np.zeros(passes, np.int64),
            np.zeros(detailed, np.int32),
            np.zeros(detailed, np.int32),
        )
        if passes:
            replay(
                trace.experts, self._bounds, self.phase, self.unit, self._resets,
                np.array(slots, np.int64), trace.num_experts, *self._rule, *found,
            )  # fmt: skip
        return found

    def distances(self, group: np.ndarray, groups: int, layers: int) -> tuple[np.ndarray, ...]:
        """Find loads_at, uses_at and largest of `distances`, for so many groups and layers."""
        trace = self._trace
        shape = (groups, layers, trace.num_experts + 1)
        found = (np.zeros(shape, np.int64), np.zeros(shape, np.int64))
        largest = np.ones(trace.num_layers, np.int64)
        if len(group):
            distances(
                trace.experts, self._bounds, group.astype(np.int64), self._resets,
                trace.num_experts, *self._rule, *found, largest,
            )  # fmt: skip
        return *found, largest
