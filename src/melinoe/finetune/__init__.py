"""
Fine-tune a mixture-of-experts model so that it needs few experts at a time, and say what it cost.
"""

from melinoe.finetune.run import FinetuneResult, finetune
from melinoe.finetune.training import train

__all__ = ["FinetuneResult", "finetune", "train"]
