"""
Predict which experts each layer will use for a prompt, before its first forward pass.

    targets.py   how often each sequence of a trace used each expert; recall of a guess
    features.py  prompts as pooled token embeddings of the served model
    model.py     Predictor: predict, top, save, load
    fit.py       fit(trace, prompts, embeddings, slots) -> Predictor
    compare.py   the learned predictor against rivals that cost nothing, and which one to use
    prompts.py   the prompts of a trace, in a file beside it
    recent.py    RecentUse: the experts used lately, learned from what is served
"""

from melinoe.predictor.compare import RIVALS, Comparison, compare
from melinoe.predictor.fit import FitSettings, fit
from melinoe.predictor.model import Predictor
from melinoe.predictor.prompts import load_prompts, save_prompts
from melinoe.predictor.recent import RecentUse
from melinoe.predictor.targets import recall_at, use_counts

__all__ = [
    "RIVALS",
    "Comparison",
    "FitSettings",
    "Predictor",
    "RecentUse",
    "compare",
    "fit",
    "load_prompts",
    "recall_at",
    "save_prompts",
    "use_counts",
]
