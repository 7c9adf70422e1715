"""
Eviction rules, compiled: the same decisions as the classes of `melinoe.cache.eviction`.

Rules are numbers here: every expert of a layer has one float64 *priority*, the lowest leaves, and
of equal ones the lowest id. Experts that are needed together carry the same *mark*.

Import it only when it is used: numba takes a good second to load. Compiled code is kept on disk
beside its file (or where ``NUMBA_CACHE_DIR`` says), so only the first use on a machine waits for
the compiler.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

import numba
import numpy as np

LRU, LFU, LFRU, STATIC, BELADY = range(5)
RULES = {"lru": LRU, "lfu": LFU, "lfru": LFRU, "static": STATIC, "belady": BELADY}

# What is compiled with these functions in it is kept by its own file's time alone. As the default
# of an argument this is part of what it is kept by, so that a change here compiles that anew too.
STAMP = crc32(Path(__file__).read_bytes())


def compiled(function: Callable[..., Any]) -> Any:
    """Compile *function* when it is first called, or take what was kept of an earlier process."""
    try:
        return numba.njit(cache=True, boundscheck=False)(function)
    except RuntimeError:  # nowhere to keep the result: compile anew in each process
        return numba.njit(boundscheck=False)(function)


@compiled
def workspace(experts, num_experts, rule):  # type: ignore[no-untyped-def]
    """What a replay writes on: ids, uses, places, next requests, the rule's state, its future."""
    rows = experts.shape[0] if rule == BELADY else 0
    return (
        np.empty(num_experts, np.int64),
        np.zeros(num_experts, np.int64),
        np.empty(num_experts, np.int64),
        np.zeros(num_experts, np.int64),
        np.empty((3, num_experts), np.float64),
        np.empty((rows, experts.shape[2]), np.int64),
    )


@compiled
def use(rule, order, count, state, clock, unit, gamma, following):  # type: ignore[no-untyped-def]
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


@compiled
def admit(  # type: ignore[no-untyped-def]
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


@compiled
def look_ahead(experts, bounds, layer, upcoming, following):  # type: ignore[no-untyped-def]
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
