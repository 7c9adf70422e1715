"""
How well a model does, with an interval over examples, paired where two models are compared.

    perplexity.py   loss per token of a text, exp of it
    decoded.py      the same read token by token, as decoding does, the cache at work
    choice_price.py what a cache-aware choice costs and saves, against the exact one
    completions.py  what a model writes after each prompt, greedy, in batches
    rouge.py        ROUGE-L of completions against references
    answers.py      exact match of the number that ends a solution
    scores.py       all of these for one model on one text
    compare.py      two models on the same examples: difference, interval, a sentence
    harness.py      tasks of the lm-evaluation-harness
    records.py      records of kinds ``quality`` and ``score``

Every function takes a plain transformers model or one that runs with few resident experts; the
two are the same model and must give the same numbers.
"""

from melinoe.evaluate.answers import exact_match, extract_answer, right_answers
from melinoe.evaluate.choice_price import ChoicePrice, price_of_choice
from melinoe.evaluate.compare import (
    Comparison,
    compare_perplexity,
    compare_rates,
    compare_scores,
)
from melinoe.evaluate.completions import complete, reference
from melinoe.evaluate.decoded import Decoded, decoded_perplexity
from melinoe.evaluate.harness import TaskScore, run_tasks
from melinoe.evaluate.perplexity import Perplexity, perplexity, perplexity_increase
from melinoe.evaluate.records import quality_record, score_record
from melinoe.evaluate.rouge import rouge_l
from melinoe.evaluate.scores import Scores, score

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
    "exact_match",
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
