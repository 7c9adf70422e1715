"""
Measure how well a model does, with an interval over examples, paired where two are compared.

    perplexity.py   loss per token of a text, in one pass or token by token
    completions.py  greedy completions of prompts, in batches
    metrics.py      ROUGE-L, and exact match of the number that ends a solution
    scores.py       all of these for one model on one text, and their records
    compare.py      two models on the same examples: difference, interval, a sentence
    choice_price.py the price and saving of a cache-aware choice, against the exact one
    harness.py      tasks of the lm-evaluation-harness

Every function takes a plain transformers model or one that runs with few resident experts; both
are the same model and must give the same numbers.
"""

from melinoe.evaluate.choice_price import ChoicePrice, price_of_choice
from melinoe.evaluate.compare import (
    Comparison,
    compare_perplexity,
    compare_rates,
    compare_scores,
)
from melinoe.evaluate.completions import complete, reference
from melinoe.evaluate.harness import TaskScore, run_tasks
from melinoe.evaluate.metrics import extract_answer, right_answers, rouge_l
from melinoe.evaluate.perplexity import (
    Decoded,
    Perplexity,
    decoded_perplexity,
    perplexity,
    perplexity_increase,
)
from melinoe.evaluate.scores import Scores, quality_record, score, score_record

__all__ = [
    "ChoicePrice",
    "Comparison",
    "Decoded",
    "Perplexity",
    "Scores",
    "TaskScore",
    "compare_perplexity",
    "compare_rates",
    "compare_scores",
    "complete",
    "decoded_perplexity",
    "extract_answer",
    "perplexity",
    "perplexity_increase",
    "price_of_choice",
    "quality_record",
    "reference",
    "right_answers",
    "rouge_l",
    "run_tasks",
    "score",
    "score_record",
]
