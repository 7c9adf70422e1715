"""What a simulation tells: counts, and what happened in each forward pass."""

from dataclasses import dataclass

import numpy as np

from melinoe.cache.counters import Counters


@dataclass(frozen=True)
class Steps:
    """
    What happened in each forward pass and layer; what a time model needs.

    Attributes:
        phase: uint8 (passes,), 0 prompt, 1 completion.
        tokens: int64 (passes,), rows.
        unit: int64 (passes,), index into `Simulation.sequences`.
        loads: int32 (passes, layers), experts copied on demand.
        experts: int32 (passes, layers), distinct experts requested.
        ahead: int32 (passes, layers), experts copied by prefetches right before the pass.
        on_host: int32 (passes, layers), missing experts that were not copied but computed where
            they were.
        on_host_uses: int32 (passes, layers), (token, choice) pairs that those were computed for.
        between: int32 (passes, layers), experts of the layer copied by a prefetch that was issued
            within the pass, when the layer reached before it had its experts and began to compute.
    """

    phase: np.ndarray
    tokens: np.ndarray
    unit: np.ndarray
    loads: np.ndarray
    experts: np.ndarray
    ahead: np.ndarray
    on_host: np.ndarray
    on_host_uses: np.ndarray
    between: np.ndarray


@dataclass(frozen=True)
class Simulation:
    """
    The outcome of `simulate`.

    Attributes:
        counters: The whole trace.
        per_sequence: The same by unit; they add up to *counters*. A unit is one sequence, or
            several that share a forward pass: a load made for a batch belongs to all of it.
        sequences: The sequence numbers of each unit, ascending.
        slots: Slots of each layer.
        policy: Its name.
        prefetch: Name of the prefetcher; ``none`` without one.
        engine: ``residency`` or ``compiled``.
        steps: Pass by pass, if that was asked for.
    """

    counters: Counters
    per_sequence: list[Counters]
    sequences: list[tuple[int, ...]]
    slots: tuple[int, ...]
    policy: str
    engine: str = "residency"
    steps: Steps | None = None
    prefetch: str = "none"
