"""
The simulator's inner loop, compiled: the same decisions as `Residency` with a built-in rule.

Import it only when it is used; see `melinoe.cache.kernel_rules`.
"""

import numpy as np

from melinoe.cache.kernel_rules import (
    BELADY,
    LRU,
    RULES,
    STAMP,
    STATIC,
    admit,
    compiled,
    distinct,
    least_used_first,
    look_ahead,
    use,
    workspace,
)

__all__ = ["RULES", "replay"]


@compiled
def replay(  # type: ignore[no-untyped-def]
    experts, bounds, phase, unit_of, begins, resets, slots, num_experts, rule, gamma, popularity,
    event_pass, event_begin, event_ids, counts, prefetched, waited, loads_of, experts_of, ahead_of,
    stamp=STAMP,
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
        stamp: Left out.
    """
    passes, layers = len(bounds) - 1, experts.shape[1]
    ids, count, place, following, state, upcoming = workspace(experts, num_experts, rule)
    order = np.empty(num_experts, np.int64)
    missing = np.empty(num_experts, np.int64)
    resident = np.empty(num_experts, np.int64)
    mark = np.zeros(num_experts, np.int64)
    # Of residents: by a prefetch for this unit, and not requested since.
    unused = np.zeros(num_experts, np.bool_)
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
            look_ahead(experts, bounds, layer, upcoming, following)
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
                    clock, unit = use(rule, order, kept, state, clock, unit, gamma, following)
                filled = admit(
                    rule, missing, 0, absent, resident, place, filled, capacity, mark, now, state,
                    clock,
                )  # fmt: skip
                for i in range(absent):
                    unused[missing[i]] = True
                prefetched[unit_of[step], layer] += absent
                if detailed:
                    ahead_of[step, layer] += absent

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
                clock, unit = use(rule, ids, found, state, clock, unit, gamma, following)
                filled = admit(
                    rule, missing, 0, absent, resident, place, filled, capacity, mark, now, state,
                    clock,
                )  # fmt: skip
            else:
                least_used_first(missing, absent, count)
                for i in range(absent):
                    order[present + i] = missing[i]
                clock, unit = use(rule, order, found, state, clock, unit, gamma, following)
                now += 1
                for i in range(present):
                    mark[order[i]] = now
                begin, end = 0, capacity - present
                while begin < absent:
                    for i in range(begin, end):
                        mark[missing[i]] = now
                    filled = admit(
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
