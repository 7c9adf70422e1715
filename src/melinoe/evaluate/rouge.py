"""ROUGE-L of completions against references."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from melinoe.errors import DataError

SETTINGS = "rouge-score's ROUGE-L, F1, Porter stemmer"


def rouge_l(
    completions: Sequence[str], references: Sequence[str], stemmer: bool = True
) -> NDArray[np.float64]:
    """
    Score each completion by the F1 of its longest common subsequence of words with the reference.

    Words are runs of a-z and 0-9, lower-cased; with *stemmer*, those of more than three letters
    are stemmed. A completion without words scores 0.

    Args:
        completions: What the model wrote, one per reference.
        references: What it should have written.
        stemmer: Porter's, on as is usual for instruction data.

    Returns:
        float64 ``(references,)``, each in [0, 1].

    Raises:
        DataError: nothing to score, or a reference without a word in this sense.
        ValueError: lengths differ.

    Source:
        Lin, ROUGE: A Package for Automatic Evaluation of Summaries, 2004; computed by the
        rouge-score package.
    """
    if len(completions) != len(references):
        raise ValueError(f"{len(completions)} completions for {len(references)} references")
    if not references:
        raise DataError("there are no completions to score; give at least one example")
    # Imports nltk, and is needed for this score only.
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenize import tokenize

    scorer = RougeScorer(["rougeL"], use_stemmer=stemmer)
    scores = np.zeros(len(references))
    for index, (completion, reference) in enumerate(zip(completions, references, strict=True)):
        if not tokenize(reference, None):
            raise DataError(
                f"reference {index} has no word of a-z or 0-9, so it has no ROUGE-L; score it by "
                "perplexity alone"
            )
        scores[index] = scorer.score(reference, completion)["rougeL"].fmeasure
    return scores
