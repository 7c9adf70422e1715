"""
Each setting once: its default, what it means, its unit.

The command line builds its options from them and the checkpoint's record writes them down, so no
default is typed twice.
"""

from melinoe.cache import MISSES
from melinoe.config.finetuning import CONTROL, FinetuneSettings
from melinoe.config.names import QUARTER, STORES, OutcomeSettings, experts_in_share, policies
