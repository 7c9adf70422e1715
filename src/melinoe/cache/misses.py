"""
What is done about a miss, and what each way costs: the formulas x and U of `melinoe.cache.timing`.

Source:
    Computing a miss where its weights are, on the host: Fiddler (arXiv:2402.07033), and llama.cpp's
    experts on the CPU. Splitting misses by measured bandwidths so that both sides end together:
    FreeToken 0.2. The rules are written down from those ideas; no code is theirs.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate

from melinoe.cache.machine import Machine, Work
from melinoe.errors import HardwareError

MISSES = ("wait", "cpu", "split")

LoadRule = Callable[[Sequence[int]], int]
"""From the uses of each missing expert, ascending, to how many of them are loaded."""


def loads_when(miss: str, machine: Machine, work: Work) -> LoadRule | None:
    """
    What `simulate` is told as ``load``, for a way to handle misses.

    ``wait``: all are loaded (None). ``cpu``: none is; the host computes them. ``split``: of the
    missing, least used first, as many are computed and the rest loaded as makes the slower of both
    sides fastest, ``max(k x, k c + U)``; of equally fast splits the one that loads most, since a
    load may be used again. A token's experts have one use each; a prompt's have many, which the
    host computes one row after the other and a load brings in once.

    Raises:
        HardwareError: the host shall compute, and its memory's bandwidth is not given.
        ValueError: an unknown way.
    """
    if miss not in MISSES:
        raise ValueError(f"miss must be one of {', '.join(MISSES)}, got {miss!r}")
    if miss == "wait":
        return None
    if machine.dram_bytes_per_s is None:
        raise HardwareError(
            f"misses cannot be handled by {miss!r} without the host memory's bandwidth; give it"
        )
    if miss == "cpu":
        return lambda uses: 0
    each = transfer_s(machine, work)

    def split(uses: Sequence[int]) -> int:
        costs = [(len(uses) * each, -len(uses))]
        there, pairs = 0, 0
        for there, pairs in enumerate(accumulate(uses), start=1):
            here = len(uses) - there
            host = here * machine.copy_s + computed_s(machine, work, there, pairs)
            costs.append((max(here * each, host), -here))
        return -min(costs)[1]

    return split


def transfer_s(machine: Machine, work: Work) -> float:
    """Seconds of one expert's transfer: x of the module's formulas."""
    carried = machine.link_latency_s + work.expert_bytes / machine.link_bytes_per_s
    return max(carried, machine.copy_s)


def computed_s(
    machine: Machine,
    work: Work,
    experts: int,
    pairs: int | None = None,
    rows: int | None = None,
) -> float:
    """
    Seconds in which the host computes missing experts: U of the formulas.

    Args:
        machine, work: Figures; the machine's *dram_bytes_per_s* among them.
        experts: How many.
        pairs: (token, choice) pairs that chose them; absent: one each.
        rows: Tokens that did; absent: the most used one's, as if spread evenly, at least one.
    """
    if not experts:
        return 0.0
    assert machine.dram_bytes_per_s is not None
    pairs = experts if pairs is None else pairs
    rows = -(-pairs // experts) if rows is None else min(rows, pairs)
    weights = experts * work.expert_bytes / machine.dram_bytes_per_s
    return (
        machine.host_call_s
        + weights
        + (pairs - experts) * machine.host_row_s
        + 2 * machine.link_latency_s
        + (rows + pairs) * work.activation_bytes / machine.link_bytes_per_s
    )
