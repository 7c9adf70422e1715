"""
Each setting once: its default, what it means, its unit.

A setting is a dataclass field whose metadata holds ``help`` (one sentence), ``unit`` (or ``None``)
and, where only some words are allowed, ``choices``. The command line builds its options from them
and the checkpoint's record writes them down, so no default is typed twice.
"""

from melinoe.config.demo import DemoSettings
from melinoe.config.finetuning import CONTROL, MATCH, PLAIN, FinetuneSettings
from melinoe.config.names import (
    MISSES,
    PREFETCH_AT,
    PREFETCH_MOMENTS,
    QUARTER,
    STORES,
    PrefetchAt,
    experts_in_share,
    policies,
)
from melinoe.config.outcome import OutcomeSettings
from melinoe.config.setting import describe, setting

__all__ = [
    "CONTROL",
    "MATCH",
    "MISSES",
    "PLAIN",
    "PREFETCH_AT",
    "PREFETCH_MOMENTS",
    "QUARTER",
    "STORES",
    "DemoSettings",
    "FinetuneSettings",
    "OutcomeSettings",
    "PrefetchAt",
    "describe",
    "experts_in_share",
    "policies",
    "setting",
]
