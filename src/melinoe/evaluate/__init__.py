"""
Measure how well a model does, with an interval over examples, paired where two are compared.

Every function takes a plain transformers model or one that runs with few resident experts; both
are the same model and must give the same numbers.
"""

from melinoe.evaluate.completions import complete, reference
from melinoe.evaluate.perplexity import (
    Perplexity,
    decoded_perplexity,
    perplexity,
    perplexity_increase,
)
from melinoe.evaluate.scores import (
    Comparison,
    Scores,
    compare_perplexity,
    compare_rates,
    compare_scores,
    extract_answer,
    price_of_choice,
    quality_record,
    right_answers,
    rouge_l,
    score,
    score_record,
)
