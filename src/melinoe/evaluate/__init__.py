"""
How well a model does, with an interval over examples, paired where two models are compared.

    perplexity.py   loss per token of a text, exp of it
    answers.py      exact match of the number that ends a solution
    records.py      records of kinds ``quality``, ``score`` and ``comparison``

Every function takes a plain transformers model or one that runs with few resident experts; the
two are the same model and must give the same numbers.
"""

from melinoe.evaluate.answers import exact_match, extract_answer
from melinoe.evaluate.perplexity import Perplexity, perplexity, perplexity_increase
from melinoe.evaluate.records import quality_record

__all__ = [
    "Perplexity",
    "exact_match",
    "extract_answer",
    "perplexity",
    "perplexity_increase",
    "quality_record",
]
