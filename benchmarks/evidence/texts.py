"""
What is read for the evidence: texts to learn from and others to judge, in and out of domain.

In domain: GSM8K rows of the training part from 6,000 on, which no run of the demo or the study
trains on. Out of domain: the six held-out corpora, two pieces of each document, 64 tokens of
prompt and 64 of completion, half of the documents to learn from. Every model reads the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from melinoe.cache.locality import popularity
from melinoe.cache.prefetch import Given
from melinoe.cache.trace import Trace
from melinoe.data import Encoded, encode, load_examples
from melinoe.measure import reading_trace
from melinoe.predictor import fit
from melinoe.shipped import GSM8K_TRAIN, HELD_OUT

FIRST, LENGTH = 6000, 512
PIECES, HALF = 2, 64  # of each document; tokens of a piece's prompt, and of its completion
IN_DOMAIN, OUT_OF_DOMAIN = "GSM8K", "six other corpora"


@dataclass(frozen=True)
class Texts:
    """Texts of one domain, and for each the document it is of; intervals are over documents."""

    domain: str
    judged: list[Encoded]
    documents: np.ndarray
    learned_from: list[Encoded]


def texts(tokenizer: Any, judged: int, learned: int) -> list[Texts]:
    """Both domains; *judged* and *learned* are numbers of texts, out of domain at most so many."""
    rows = load_examples(GSM8K_TRAIN, limit=FIRST + judged + learned)[FIRST:]
    maths = encode(rows, tokenizer, LENGTH)
    found = [Texts(IN_DOMAIN, maths[:judged], np.arange(judged), maths[judged:])]
    others = []  # document, corpus, piece and its tokens
    for file in sorted(HELD_OUT.glob("*.jsonl")):
        for document, example in enumerate(load_examples(file)):
            ids = tokenizer(example.prompt + example.completion)["input_ids"]
            for piece in range(min(PIECES, len(ids) // (2 * HALF))):
                cut = list(ids[2 * HALF * piece : 2 * HALF * (piece + 1)])
                text = Encoded(cut, [False] * HALF + [True] * HALF)
                others.append((document, file.stem, piece, text))
    # Documents in turn over the corpora, so that fewer texts are still of all of them.
    others.sort(key=lambda one: one[:3])
    to_judge = [one for one in others if one[0] % 2 == 0][:judged]
    to_learn = [one for one in others if one[0] % 2 == 1][:learned]
    names = [f"{source} {document}" for document, source, _, _ in to_judge]
    documents = np.unique(names, return_inverse=True)[1]
    pieces = ([text for *_, text in part] for part in (to_judge, to_learn))
    return [*found, Texts(OUT_OF_DOMAIN, next(pieces), documents, next(pieces))]


@dataclass(frozen=True)
class Seen:
    """What one model chose on the texts of one domain."""

    model: str
    domain: str
    judged: Trace
    prompts: list[list[int]]
    documents: np.ndarray
    learned_from: Trace
    learned_prompts: list[list[int]]
    weight: Any

    def given(self, slots: int) -> Given:
        """What prefetches are made of: the texts to learn from, of the same domain, alone."""
        past, ids = self.learned_from, self.learned_prompts
        return Given(popularity(past), fit(past, ids, self.weight, slots))


def see(name: str, model: Any, handle: Any, of: Texts) -> Seen:
    """Let a model read all texts of a domain."""
    return Seen(
        name,
        of.domain,
        reading_trace(model, handle, of.judged),
        prompts(of.judged),
        of.documents,
        reading_trace(model, handle, of.learned_from),
        prompts(of.learned_from),
        model.get_input_embeddings().weight,
    )


def prompts(encoded: Sequence[Encoded]) -> list[list[int]]:
    """Token ids before each completion."""
    return [one.input_ids[: one.completion_mask.index(True)] for one in encoded]
