"""Score completions against references: ROUGE-L, and the number that ends a solution."""

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

import numpy as np

from melinoe.errors import DataError
from melinoe.evaluate.perplexity import Floats

_ANSWER = re.compile(r"####\s*(-?\s*\$?\s*-?[0-9][0-9,]*(?:\.[0-9]+)?|-?\s*\$?\s*\.[0-9]+)")


def extract_answer(text: str) -> Decimal | None:
    """
    Return the number after the first ``####``, as GSM8K marks answers.

    Dollar signs and thousands' commas are dropped, and equal numbers are equal however they are
    written (``5``, ``5.00``). The first mark counts, because a model that goes on after its answer
    starts the next question. ``None`` if there is no mark with a number behind it.
    """
    found = _ANSWER.search(text)
    if found is None:
        return None
    try:
        return Decimal(re.sub(r"[$,\s]", "", found.group(1)))
    except InvalidOperation:
        return None


def right_answers(completions: Sequence[str], references: Sequence[str]) -> Floats:
    """
    Score each completion 1 if its answer equals the reference's, else 0.

    A completion without an answer is wrong; each reference has a ``####`` line.

    Raises:
        DataError: nothing to score, or a reference without an answer.
        ValueError: lengths differ.
    """
    _check(completions, references)
    right = np.zeros(len(references))
    for index, (completion, reference) in enumerate(zip(completions, references, strict=True)):
        wanted = extract_answer(reference)
        if wanted is None:
            raise DataError(
                f"reference {index} has no number after '####'; exact match needs GSM8K's form"
            )
        right[index] = extract_answer(completion) == wanted
    return right


def rouge_l(completions: Sequence[str], references: Sequence[str]) -> Floats:
    """
    Score each completion by the F1 of its longest common subsequence of words with the reference.

    Words are runs of a-z and 0-9, lower-cased; those of more than three letters are stemmed by
    Porter's rules, as is usual for instruction data. A completion without words scores 0.

    Raises:
        DataError: nothing to score, or a reference without a word in this sense.
        ValueError: lengths differ.

    Source:
        Lin, ROUGE: A Package for Automatic Evaluation of Summaries, 2004; computed by the
        rouge-score package.
    """
    _check(completions, references)
    # Imports nltk, and is needed for this score only.
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenize import tokenize

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    scores = np.zeros(len(references))
    for index, (completion, reference) in enumerate(zip(completions, references, strict=True)):
        if not tokenize(reference, None):
            raise DataError(
                f"reference {index} has no word of a-z or 0-9, so it has no ROUGE-L; score it by "
                "perplexity alone"
            )
        scores[index] = scorer.score(reference, completion)["rougeL"].fmeasure
    return scores


def _check(completions: Sequence[str], references: Sequence[str]) -> None:
    if len(completions) != len(references):
        raise ValueError(f"{len(completions)} completions for {len(references)} references")
    if not references:
        raise DataError("there are no completions to score; give at least one example")
