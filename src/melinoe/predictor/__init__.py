"""
Prompt in, experts out: which experts each layer will use, known before the first forward pass.

    targets.py   what a trace says: how often each sequence used each expert; recall of a guess
    encoders.py  what reads a prompt: the model's own embeddings, or sentence-transformers
    model.py     Predictor: predict, top, save, load
    fit.py       fit(trace, prompts, encoder, slots) -> Predictor
    prompts.py   the prompts of a trace, in a file beside it
    prior.py     Prior: what was served lately, by user or deployment; AdaptivePredictor: it at work
    compare.py   the learned predictor against rivals that cost nothing, and which one to use
"""

from melinoe.predictor.compare import RIVALS, Comparison, compare
from melinoe.predictor.encoders import EmbeddingEncoder, Encoder, SentenceEncoder
from melinoe.predictor.fit import FitSettings, fit
from melinoe.predictor.model import Predictor
from melinoe.predictor.prior import AdaptivePredictor, Prior, open_prior
from melinoe.predictor.prompts import load_prompts, save_prompts
from melinoe.predictor.targets import recall_at, use_counts

__all__ = [
    "RIVALS",
    "AdaptivePredictor",
    "Comparison",
    "EmbeddingEncoder",
    "Encoder",
    "FitSettings",
    "Predictor",
    "Prior",
    "SentenceEncoder",
    "compare",
    "fit",
    "load_prompts",
    "open_prior",
    "recall_at",
    "save_prompts",
    "use_counts",
]
