"""Which sequences a cost can be told apart for: those that share no forward pass."""

import numpy as np

from melinoe.cache.trace import Trace


def units_of(trace: Trace) -> list[tuple[int, ...]]:
    """Sequences grouped by shared forward passes, in the order in which the groups begin."""
    rows = np.stack([trace.forward, trace.sequence], axis=1)
    changes = np.flatnonzero(np.any(np.diff(rows, axis=0, prepend=rows[:1] - 1), axis=1))
    pairs = rows[changes]
    # Rows of a pass that belong to one sequence are one change; so without a shared pass there are
    # as many changes as passes.
    if len(pairs) == len(np.unique(pairs[:, 0])):
        return [(sequence,) for sequence in dict.fromkeys(pairs[:, 1].tolist())]
    group: dict[int, int] = {}

    def find(sequence: int) -> int:
        while group[sequence] != sequence:
            group[sequence] = sequence = group[group[sequence]]
        return sequence

    leader, of_forward = -1, -1
    for forward, sequence in pairs.tolist():
        if forward != of_forward:
            leader, of_forward = sequence, forward
        group.setdefault(sequence, sequence)
        group[find(sequence)] = find(leader)
    units: dict[int, list[int]] = {}
    for sequence in group:  # insertion order is the order of first rows
        units.setdefault(find(sequence), []).append(sequence)
    return [tuple(sorted(unit)) for unit in units.values()]
