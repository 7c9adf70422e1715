"""
Cache-aware choice over whole texts, compiled: who would run if each token were decoded in turn.

A token's choice depends on who is resident, and that on every choice before it, so nothing here can
be computed for all tokens at once; but a layer's choices depend on its router's logits alone, so a
layer is walked through without the model. Import it only when it is used: numba takes a good second
to load.

The rule is that of `melinoe.moe.choice` (the cache prior) over a cache as `Residency` keeps it
under decayed LFU, in the same arithmetic; a test holds them against each other.
"""

import numpy as np

from melinoe.cache.kernel import LFU, STAMP, admit, compiled, least_used_first, use

MEMORY = 0.99  # of the running mean of the logits' spread, per token


@compiled
def _prefer(z, chosen, place, gain, keep, wanted, stays, taken):  # type: ignore[no-untyped-def]
    """
    Choose for one token; returns how many places of *chosen* (top_k,) are given to others.

    Residents rank by their logit and *gain* (above the least of the chosen only the order counts),
    others by their logit; who is resident, or among the *keep* most wanted, stays.
    """
    top_k = len(chosen)
    least = z[chosen[0]]
    for k in range(top_k):
        least = min(least, z[chosen[k]])
        stays[k] = place[chosen[k]] >= 0
        wanted[k] = chosen[k]
    taken[:] = False
    for _ in range(min(keep, top_k)):
        first = -1
        for k in range(top_k):
            if not taken[chosen[k]] and (first < 0 or z[chosen[k]] > z[chosen[first]]):
                first = k
        taken[chosen[first]] = True
        stays[first] = True
    # From here on: who may not be taken any more.
    taken[:] = False
    places = 0
    for k in range(top_k):
        if stays[k]:
            taken[chosen[k]] = True
        else:
            places += 1
    came = 0
    for _ in range(places):
        best, height, is_new = -1, np.float32(0), False
        for expert in range(len(place)):
            if taken[expert]:
                continue
            own = False
            for k in range(top_k):
                if chosen[k] == expert:
                    own = True
            if own:
                rank = z[expert]
            elif place[expert] >= 0:
                over = max(z[expert] - least, np.float32(0))
                rank = z[expert] - np.float32(0.999) * over + gain
            else:
                continue
            if best < 0 or rank > height:
                best, height, is_new = expert, rank, not own
        taken[best] = True
        if is_new:
            wanted[top_k + came] = best
            came += 1
        else:
            for k in range(top_k):
                if chosen[k] == best:
                    stays[k] = True
    at = 0
    for k in range(top_k):
        if not stays[k]:
            wanted[k] = wanted[top_k + at]
            at += 1
    for k in range(top_k):
        chosen[k] = wanted[k]
    return came


@compiled
def choose(  # type: ignore[no-untyped-def]
    logits, chosen, segment, decoded, capacity, gamma, strength, keep, memory, stamp=STAMP,
):  # fmt: skip
    """
    Replace choices as decoding the texts with the cache prior would, each from an empty cache.

    Args:
        logits: float32 (rows, tokens, num_experts).
        chosen: int64 (rows, tokens, top_k), the router's choices, changed in place; ids outside the
            experts mean none, and a token that has one keeps its choices.
        segment: int64 (rows, tokens), as the collators of `melinoe.data` give it.
        decoded: bool (rows, tokens): tokens that are decoded one by one; each run of others in a
            text is one request, as a prompt is, and keeps its choices.
        capacity: Slots; the experts of one token fit.
        gamma: Decay per request.
        strength: Of the prior.
        keep: The first so many choices of a token stay.
        memory: `MEMORY`.
        stamp: Of the rules that are compiled in.

    Returns:
        Choices replaced, and choices of decoded tokens in all.
    """
    rows, tokens, top_k = chosen.shape
    num_experts = logits.shape[2]
    state = np.zeros((3, num_experts), np.float64)
    resident = np.empty(num_experts, np.int64)
    place = np.empty(num_experts, np.int64)
    mark = np.zeros(num_experts, np.int64)
    count = np.zeros(num_experts, np.int64)
    order = np.empty(num_experts, np.int64)
    missing = np.empty(num_experts, np.int64)
    wanted = np.empty(2 * top_k, np.int64)
    stays = np.empty(top_k, np.bool_)
    taken = np.empty(num_experts, np.bool_)
    now, replaced, uses = 0, 0, 0
    for row in range(rows):
        filled, unit, spread, t = 0, 1.0, -1.0, 0
        while t < tokens:
            if segment[row, t] < 0:
                t += 1
                continue
            if t == 0 or segment[row, t] != segment[row, t - 1]:
                state[:] = 0.0
                place[:] = -1
                filled, unit, spread = 0, 1.0, -1.0
            end = t + 1
            if decoded[row, t]:
                z = logits[row, t]
                whole = True
                for k in range(top_k):
                    if chosen[row, t, k] < 0 or chosen[row, t, k] >= num_experts:
                        whole = False
                high, low = z[0], z[0]
                for expert in range(num_experts):
                    high, low = max(high, z[expert]), min(low, z[expert])
                apart = float(high - low)
                spread = apart if spread < 0 else memory * spread + (1 - memory) * apart
                uses += top_k
                if whole:
                    gain = np.float32(strength * spread)
                    replaced += _prefer(z, chosen[row, t], place, gain, keep, wanted, stays, taken)
            else:
                while (
                    end < tokens and not decoded[row, end] and segment[row, end] == segment[row, t]
                ):
                    end += 1
            # One request: its distinct experts, ascending.
            found, present, absent = 0, 0, 0
            for at in range(t, end):
                for k in range(top_k):
                    expert = chosen[row, at, k]
                    if 0 <= expert < num_experts:
                        count[expert] += 1
            for expert in range(num_experts):
                if count[expert]:
                    found += 1
                    if place[expert] >= 0:
                        order[present] = expert
                        present += 1
                    else:
                        missing[absent] = expert
                        absent += 1
            if found > capacity:
                least_used_first(missing, absent, count)
            for i in range(absent):
                order[present + i] = missing[i]
            if found:
                unit = use(LFU, order[:found], state, unit, gamma, order)
            now += 1
            for i in range(present):
                mark[order[i]] = now
            begin, until = 0, min(absent, capacity - present)
            while begin < absent:
                for i in range(begin, until):
                    mark[missing[i]] = now
                filled = admit(
                    LFU, missing, begin, until, resident, place, filled, capacity, mark, now, state,
                    unit,
                )  # fmt: skip
                begin, until = until, min(until + capacity, absent)
                now += 1
            for i in range(found):
                count[order[i]] = 0
            t = end
    return replaced, uses
