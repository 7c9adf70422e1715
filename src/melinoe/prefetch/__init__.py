"""
Strategies of prefetch: one small class each, by name, for simulator, runtime, command line, report.

    registry.py   names -> classes: ours, registered ones, and entry points of installed packages
    counted.py    popularity, prefill: experts counted elsewhere, or in the prompt's own pass
    predicted.py  predictor: what a fitted predictor names for the prompt
    routed.py     next-router: what the next layer's router says of this layer's hidden state
"""

from melinoe.cache.prefetcher import Given, Prefetcher, Prompt, Timed
from melinoe.prefetch.registry import (
    NONE,
    prefetcher,
    prefetcher_class,
    prefetcher_names,
    register,
)

__all__ = [
    "NONE",
    "Given",
    "Prefetcher",
    "Prompt",
    "Timed",
    "prefetcher",
    "prefetcher_class",
    "prefetcher_names",
    "register",
]
