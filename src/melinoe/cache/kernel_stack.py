"""
All cache sizes in one pass, compiled, for rules that are stack algorithms (`melinoe.cache.curves`).

Import it only when it is used; see `melinoe.cache.kernel_rules`.
"""

import numpy as np

from melinoe.cache.kernel_rules import (
    BELADY,
    LFRU,
    STAMP,
    STATIC,
    compiled,
    distinct,
    look_ahead,
    use,
    workspace,
)


@compiled
def distances(  # type: ignore[no-untyped-def]
    experts, bounds, group, resets, num_experts, rule, gamma, popularity, loads_at, uses_at,
    largest, stamp=STAMP,
):  # fmt: skip
    """
    The least slots with which each request's experts would have been resident, for all sizes.

    A stack holds every expert seen, so that a cache of C slots holds the first C of it. A request
    of n experts puts them first; after them, the cache of C slots keeps the best C - n others that
    it held, so each place takes the best that has not found one yet.

    Args:
        experts, bounds, resets, num_experts, rule, gamma, popularity: As in
            `melinoe.cache.kernel.replay`.
        group: int64 (passes,), whose counts the pass belongs to.
        loads_at, uses_at: int64 (groups, layers, num_experts + 1), filled: by group, layer and
            distance - 1, how many experts of requests, and uses of them; the last column is "never
            before". With one layer in these alone, all layers are added up.
        largest: int64 (layers,), filled: experts of the largest request.
        stamp: Left out.
    """
    passes, layers = len(bounds) - 1, experts.shape[1]
    ids, count, place, following, state, upcoming = workspace(experts, num_experts, rule)
    stack = np.empty(num_experts, np.int64)
    after = np.empty(num_experts, np.int64)
    pool = np.empty(num_experts, np.int64)
    priority, last, frequency = state[0], state[1], state[2]
    for layer in range(layers):
        at_layer = layer if loads_at.shape[1] > 1 else 0
        state[:] = 0.0
        if rule == STATIC:
            priority[:] = popularity[layer]
        elif rule == BELADY:
            look_ahead(experts, bounds, layer, upcoming, following)
        clock, unit, depth = 0, 1.0, 0
        place[:] = -1
        for step in range(passes):
            if resets[step]:
                depth = 0
                place[:] = -1
                clock, unit = 0, 1.0
                if rule != STATIC and rule != BELADY:
                    state[:] = 0.0
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
            clock, unit = use(rule, ids, found, state, clock, unit, gamma, following)
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
