"""Predict which experts each layer will use for a prompt, before its first forward pass."""

from melinoe.predictor.compare import RIVALS, Comparison, compare
from melinoe.predictor.fit import FitSettings, fit, recall_at, use_counts
from melinoe.predictor.model import Predictor
from melinoe.predictor.prompts import load_prompts, save_prompts
