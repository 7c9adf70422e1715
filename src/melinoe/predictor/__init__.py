"""
Predict which experts each layer will use for a prompt, before its first forward pass.

    model.py     prompts as pooled token embeddings; Predictor: predict, top, save, load
    fit.py       fit(trace, prompts, embeddings, slots) -> Predictor, and what it is judged by
    compare.py   the learned predictor against rivals that cost nothing, and which one to use
    prompts.py   the prompts of a trace, in a file beside it
"""

from melinoe.predictor.compare import RIVALS, Comparison, compare
from melinoe.predictor.fit import FitSettings, fit, recall_at, use_counts
from melinoe.predictor.model import Predictor
from melinoe.predictor.prompts import load_prompts, save_prompts

__all__ = [
    "RIVALS",
    "Comparison",
    "FitSettings",
    "Predictor",
    "compare",
    "fit",
    "load_prompts",
    "recall_at",
    "save_prompts",
    "use_counts",
]
