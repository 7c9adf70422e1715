"""
The simulator's inner loop, compiled: the same decisions as `Residency` with a built-in rule.

Import it only when it is used: numba takes a good second to load. Compiled code is kept on disk
beside this file (or where ``NUMBA_CACHE_DIR`` says), so only the first use on a machine waits for
the compiler.

Rules are numbers here: every expert of a layer has one float64 *priority*, the lowest leaves, and
of equal ones the lowest id. Experts that are needed together carry the same *mark*.
"""

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

LRU, LFU, LFRU, STATIC, BELADY = range(5)
RULES = {"lru": LRU, "lfu": LFU, "lfru": LFRU, "static": STATIC, "belady": BELADY}


def _compiled(function: Callable[..., Any]) -> Any:
    try:
        return numba.njit(cache=True, boundscheck=False)(function)
    except RuntimeError:  # nowhere to keep the result: compile anew in each process
        return numba.njit(boundscheck=False)(function)


@_compiled
def _use(rule, order, count, state, clock, unit, gamma, following):  # type: ignore[no-untyped-def]
    """Tell the rule of one request, served in *order*; returns the new clock and unit."""
    priority, last, frequency = state[0], state[1], state[2]
    if rule == LRU:
        for i in range(count):
            priority[order[i]] = clock
            clock += 1
    elif rule == LFU:
        unit = unit / gamma
        if unit > 2.0**512:
            shift = math.frexp(unit)[1]
            for expert in range(len(priority)):
                priority[expert] = math.ldexp(priority[expert], -shift)
            unit = math.ldexp(unit, -shift)
        for i in range(count):
            priority[order[i]] += unit
    elif rule == LFRU:
        clock += 1
        for i in range(count):
            last[order[i]] = clock
            frequency[order[i]] += 1
    elif rule == BELADY:
        for i in range(count):
            priority[order[i]] = -following[order[i]]
    return clock, unit


@_compiled
def _admit(  # type: ignore[no-untyped-def]
    rule, missing, begin, end, resident, place, filled, capacity, mark, now, state, clock
):
    """Give slots to ``missing[begin:end]``, evicting nobody marked *now*; returns slots in use."""
    priority, last, frequency = state[0], state[1], state[2]
    free = capacity - filled
    for i in range(begin, min(end, begin + free)):
        resident[filled] = missing[i]
        place[missing[i]] = filled
        filled += 1
    if begin + free >= end:
        return filled
    if rule == LFRU:
        for i in range(filled):
            expert = resident[i]
            priority[expert] = frequency[expert] / (clock - last[expert] + 1)
    for i in range(begin + free, end):
        victim = -1
        for j in range(filled):
            expert = resident[j]
            if mark[expert] == now:
                continue
            if (
                victim < 0
                or priority[expert] < priority[victim]
                or (priority[expert] == priority[victim] and expert < victim)
            ):
                victim = expert
        slot = place[victim]
        place[victim] = -1
        resident[slot] = missing[i]
        place[missing[i]] = slot
    return filled


@_compiled
def _distinct(experts, low, high, layer, ids, count, following, upcoming):  # type: ignore[no-untyped-def]
    """Who is requested by rows *low* to *high*, ascending, and how often; returns how many."""
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
    if found <= 24:  # insertion sort
        for i in range(1, found):
            expert = ids[i]
            j = i - 1
            while j >= 0 and ids[j] > expert:
                ids[j + 1] = ids[j]
                j -= 1
            ids[j + 1] = expert
    else:
        found = 0
        for expert in range(len(count)):
            if count[expert]:
                ids[found] = expert
                found += 1
    return found


@_compiled
def _look_ahead(experts, bounds, layer, upcoming, following):  # type: ignore[no-untyped-def]
    """For each choice, the pass that next requests its expert; leaves each expert's first."""
    never = len(bounds)
    following[:] = never
    for step in range(len(bounds) - 2, -1, -1):
        for row in range(bounds[step], bounds[step + 1]):
            for k in range(experts.shape[2]):
                expert = experts[row, layer, k]
                if expert >= 0:
                    upcoming[row, k] = following[expert]
        for row in range(bounds[step], bounds[step + 1]):
            for k in range(experts.shape[2]):
                expert = experts[row, layer, k]
                if expert >= 0:
                    following[expert] = step


@_compiled
def replay(  # type: ignore[no-untyped-def]
    experts, bounds, phase, unit_of, begins, resets, slots, num_experts, rule, gamma, popularity,
    event_pass, event_begin, event_ids, counts, prefetched, waited, loads_of, experts_of, ahead_of,
):  # fmt: skip
    """
    Replay all layers, one after the other.

    Args:
        experts: int16 (rows, layers, top_k).
        bounds: int64 (passes + 1,), where each pass's rows begin.
        phase: uint8 (passes,).
        unit_of: int64 (passes,), whose counters the pass belongs to.
        begins: bool (passes,), whether the pass is the first of its unit.
        resets: bool (passes,), whether the cache is emptied before the pass.
        slots: int64 (layers,).
        num_experts: Experts of each layer.
        rule: A value of `RULES`.
        gamma: For LFU.
        popularity: float64 (layers, num_experts), for STATIC.
        event_pass: int64 (events,), ascending: before which pass each prefetch comes.
        event_begin: int64 (events * layers + 1,), where the ids of each (event, layer) begin.
        event_ids: int64, the most wanted first.
        counts: int64 (units, 2, 6, layers), filled: uses, hits, loads, requests, chunked, and
            experts of prefetches that were used.
        prefetched: int64 (units, layers), filled.
        waited: int64 (passes,), filled: demand loads of all layers.
        loads_of, experts_of, ahead_of: int32 (passes, layers), filled unless empty: demand loads,
            distinct experts, and loads of prefetches that come right before the pass.
    """
    passes, layers = len(bounds) - 1, experts.shape[1]
    ids = np.empty(num_experts, np.int64)
    count = np.zeros(num_experts, np.int64)
    order = np.empty(num_experts, np.int64)
    missing = np.empty(num_experts, np.int64)
    resident = np.empty(num_experts, np.int64)
    place = np.empty(num_experts, np.int64)
    mark = np.zeros(num_experts, np.int64)
    following = np.zeros(num_experts, np.int64)
    # Of residents: by a prefetch for this unit, and not requested since.
    unused = np.zeros(num_experts, np.bool_)
    state = np.empty((3, num_experts), np.float64)
    wide = experts.shape[0] if rule == BELADY else 0
    upcoming = np.empty((wide, experts.shape[2]), np.int64)
    detailed = len(loads_of) > 0
    now = 0
    for layer in range(layers):
        capacity = slots[layer]
        state[:] = 0.0
        if rule == LRU:
            state[0] = -1.0
        elif rule == STATIC:
            state[0] = popularity[layer]
        elif rule == BELADY:
            _look_ahead(experts, bounds, layer, upcoming, following)
            state[0] = -following
        clock, unit, filled, event = 0, 1.0, 0, 0
        place[:] = -1
        for step in range(passes):
            if resets[step]:
                filled = 0
                place[:] = -1
                clock, unit = 0, 1.0
                if rule != STATIC and rule != BELADY:
                    state[:] = 0.0
            if begins[step]:
                unused[:] = False
            own = counts[unit_of[step], phase[step]]
            while event < len(event_pass) and event_pass[event] == step:
                begin = event_begin[event * layers + layer]
                kept = min(event_begin[event * layers + layer + 1] - begin, capacity)
                event += 1
                if kept == 0:
                    continue
                now += 1
                absent = 0
                for i in range(kept):
                    expert = event_ids[begin + i]
                    mark[expert] = now
                    order[kept - 1 - i] = expert
                    if place[expert] < 0:
                        missing[absent] = expert
                        absent += 1
                if rule != BELADY:
                    clock, unit = _use(rule, order, kept, state, clock, unit, gamma, following)
                filled = _admit(
                    rule, missing, 0, absent, resident, place, filled, capacity, mark, now, state,
                    clock,
                )  # fmt: skip
                for i in range(absent):
                    unused[missing[i]] = True
                prefetched[unit_of[step], layer] += absent
                if detailed:
                    ahead_of[step, layer] += absent

            found = _distinct(
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
                    own[5, layer] += unused[expert]
                    order[present] = expert
                    present += 1
                else:
                    missing[absent] = expert
                    absent += 1
                unused[expert] = False
            if found <= capacity:
                now += 1
                for i in range(found):
                    mark[ids[i]] = now
                clock, unit = _use(rule, ids, found, state, clock, unit, gamma, following)
                filled = _admit(
                    rule, missing, 0, absent, resident, place, filled, capacity, mark, now, state,
                    clock,
                )  # fmt: skip
            else:
                # The least used first, of equally used ones the lowest id.
                for i in range(1, absent):
                    expert = missing[i]
                    j = i - 1
                    while j >= 0 and count[missing[j]] > count[expert]:
                        missing[j + 1] = missing[j]
                        j -= 1
                    missing[j + 1] = expert
                for i in range(absent):
                    order[present + i] = missing[i]
                clock, unit = _use(rule, order, found, state, clock, unit, gamma, following)
                now += 1
                for i in range(present):
                    mark[order[i]] = now
                begin, end = 0, capacity - present
                while begin < absent:
                    for i in range(begin, end):
                        mark[missing[i]] = now
                    filled = _admit(
                        rule, missing, begin, end, resident, place, filled, capacity, mark, now,
                        state, clock,
                    )  # fmt: skip
                    begin, end = end, min(end + capacity, absent)
                    now += 1
                own[4, layer] += 1
            own[0, layer] += uses
            own[1, layer] += hits
            own[2, layer] += absent
            own[3, layer] += 1
            waited[step] += absent
            if detailed:
                loads_of[step, layer] = absent
                experts_of[step, layer] = found
            for i in range(found):
                count[ids[i]] = 0


@_compiled
def distances(  # type: ignore[no-untyped-def]
    experts, bounds, phase, resets, num_experts, rule, gamma, popularity, loads_at, uses_at,
    largest,
):  # fmt: skip
    """
    The least slots with which each request's experts would have been resident, for all sizes.

    A stack holds every expert seen, so that a cache of C slots holds the first C of it. A request
    of n experts puts them first; after them, the cache of C slots keeps the best C - n others that
    it held, so each place takes the best that has not found one yet.

    Args:
        experts, bounds, phase, resets, num_experts, rule, gamma, popularity: As in `replay`.
        loads_at, uses_at: int64 (2, layers, num_experts + 1), filled: by phase, layer and distance
            - 1, how many experts of requests, and uses of them; the last column is "never before".
        largest: int64 (layers,), filled: experts of the largest request.
    """
    passes, layers = len(bounds) - 1, experts.shape[1]
    ids = np.empty(num_experts, np.int64)
    count = np.zeros(num_experts, np.int64)
    place = np.empty(num_experts, np.int64)
    stack = np.empty(num_experts, np.int64)
    after = np.empty(num_experts, np.int64)
    pool = np.empty(num_experts, np.int64)
    following = np.zeros(num_experts, np.int64)
    state = np.empty((3, num_experts), np.float64)
    wide = experts.shape[0] if rule == BELADY else 0
    upcoming = np.empty((wide, experts.shape[2]), np.int64)
    priority, last, frequency = state[0], state[1], state[2]
    for layer in range(layers):
        state[:] = 0.0
        if rule == STATIC:
            priority[:] = popularity[layer]
        elif rule == BELADY:
            _look_ahead(experts, bounds, layer, upcoming, following)
        clock, unit, depth = 0, 1.0, 0
        place[:] = -1
        for step in range(passes):
            if resets[step]:
                depth = 0
                place[:] = -1
                clock, unit = 0, 1.0
                if rule != STATIC and rule != BELADY:
                    state[:] = 0.0
            found = _distinct(
                experts, bounds[step], bounds[step + 1], layer, ids, count, following, upcoming
            )
            if found == 0:
                continue
            largest[layer] = max(largest[layer], found)
            for i in range(found):
                at = place[ids[i]]
                distance = at if at >= 0 else num_experts
                loads_at[phase[step], layer, distance] += 1
                uses_at[phase[step], layer, distance] += count[ids[i]]
            clock, unit = _use(rule, ids, found, state, clock, unit, gamma, following)
            if rule == LFRU:
                for i in range(depth):
                    one = stack[i]
                    priority[one] = frequency[one] / (clock - last[one] + 1)

            for i in range(found):
                after[i] = ids[i]
            waiting, seen, filled = 0, 0, found
            while seen < depth or waiting:
                # What a cache of filled + 1 slots held, and no smaller one has kept.
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
                    if priority[one] > priority[other] or (
                        priority[one] == priority[other] and one > other
                    ):
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
