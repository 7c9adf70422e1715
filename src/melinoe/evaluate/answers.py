"""Exact match of the number that ends a solution, as GSM8K marks it."""

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

import numpy as np
from numpy.typing import NDArray

from melinoe.errors import DataError
from melinoe.stats import Estimate, bootstrap

Floats = NDArray[np.float64]

_ANSWER = re.compile(r"####\s*(-?\s*\$?\s*-?[0-9][0-9,]*(?:\.[0-9]+)?|-?\s*\$?\s*\.[0-9]+)")


def extract_answer(text: str) -> Decimal | None:
    """
    Read the number after the first ``####``, as GSM8K marks answers.

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

    A completion without an answer is wrong.

    Args:
        completions: What the model wrote, one per question.
        references: The right solutions, each with its ``####`` line.

    Returns:
        float64 ``(questions,)``.

    Raises:
        DataError: nothing to score, or a reference without an answer.
        ValueError: lengths differ.
    """
    if len(completions) != len(references):
        raise ValueError(f"{len(completions)} completions for {len(references)} references")
    if not references:
        raise DataError("there are no answers to score; give at least one question")
    right = np.zeros(len(references))
    for index, (completion, reference) in enumerate(zip(completions, references, strict=True)):
        wanted = extract_answer(reference)
        if wanted is None:
            raise DataError(
                f"reference {index} has no number after '####'; exact match needs GSM8K's form"
            )
        right[index] = extract_answer(completion) == wanted
    return right


def exact_match(completions: Sequence[str], references: Sequence[str]) -> Estimate:
    """Share of completions whose answer equals the reference's; see `right_answers`."""
    return bootstrap(right_answers(completions, references))
