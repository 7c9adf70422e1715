"""
Measure how well a model does, with an interval over examples, paired where two are compared.

Every function takes a plain transformers model or one that runs with few resident experts; both
are the same model and must give the same numbers.
"""

from melinoe.evaluate.perplexity import (
    Perplexity,
    decoded_perplexity,
    perplexity,
    perplexity_increase,
)
from melinoe.evaluate.scores import (
    Comparison,
    compare_perplexity,
    compare_rates,
    price_of_choice,
    quality_record,
)
