"""
How a prompt passes through a cache that must not lose what decoding uses.

A prompt needs most experts of a layer once. Served as a request it would evict everything, so the
fast engine streams it: experts that are not resident pass through staging memory, one after the
other, and only the most used of them are given slots. The simulator follows the same rule.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from melinoe.cache.residency import Load, Residency


class Stream(NamedTuple):
    """
    How one request of a prompt is served.

    Attributes:
        hits: Experts that are resident, ids ascending.
        admitted: Experts copied into slots, the most used first.
        passing: Experts that only pass through, the most used first.
        first_uses: As `Decision.first_uses`.
    """

    hits: tuple[int, ...]
    admitted: tuple[Load, ...]
    passing: tuple[int, ...]
    first_uses: int = 0

    @property
    def loads(self) -> int:
        """Experts copied: each that was not resident, once."""
        return len(self.admitted) + len(self.passing)


@dataclass(frozen=True)
class StreamedPrefill:
    """
    The rule by which prompts are streamed.

    Of the experts that are not resident the most used (ties: the lowest id) are admitted: as many
    as there are free slots, and at most *admit* more, in place of residents that the same pass
    does not use; which of those leave, the policy says. No expert that the pass uses is evicted.
    Slots are given in that order, the free ones first. The policy hears of one request, with the
    experts in ascending order of their uses, ties by id: so the most used count as the most recent.

    Args:
        admit: The most experts of one request that may evict another; None sets no limit. 0 keeps
            every resident, which is what sequences that decode meanwhile want.
    """

    admit: int | None = None

    def __post_init__(self) -> None:
        if self.admit is not None and self.admit < 0:
            raise ValueError(f"admit cannot be {self.admit}; it must be 0 or more, or None")

    def serve(
        self,
        residency: Residency,
        experts: Sequence[int],
        uses: Sequence[int],
        scores: Sequence[float] | None = None,
    ) -> Stream:
        """
        Decide one request of a prompt, and remember what it admits.

        Args:
            residency: Of the layer.
            experts: Distinct ids, ascending.
            uses: How many (token, choice) pairs picked each.
            scores: As in `Residency.request`.

        Raises:
            ValueError: an id is out of range or given twice. Nothing has changed.
        """
        if not len(experts):
            return Stream((), (), ())
        needed = residency.check(experts)
        count = dict(zip(experts, uses, strict=True))
        hits = tuple(expert for expert in experts if expert in residency)
        missing = sorted(
            (expert for expert in experts if expert not in residency),
            key=lambda expert: (-count[expert], expert),
        )
        if scores is not None:
            residency.policy.weigh(experts, scores)
        residency.policy.use(sorted(experts, key=lambda expert: (count[expert], expert)))
        first = residency.first_uses(experts)
        free = residency.capacity - len(residency)
        replaceable = len(residency) - len(hits)
        room = free + (replaceable if self.admit is None else min(self.admit, replaceable))
        admitted = residency._admit(missing[:room], needed) if missing[:room] else ()
        return Stream(hits, admitted, tuple(missing[room:]), first)
