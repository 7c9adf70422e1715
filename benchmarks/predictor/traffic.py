"""
Traffic for the study: prompts with a source and a document each, and what a model chose on them.

Every document of the six held-out corpora is cut into pieces: 64 tokens of prompt, 64 of
completion. GSM8K's questions are prompts, their answers completions. *Read*: every model reads the
same completions, so that models differ in routing alone. *Written*: each writes its own, greedily.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from melinoe.cache.trace import Trace
from melinoe.checkpoint import describe, load_tokenizer
from melinoe.data import Encoded, encode, load_examples
from melinoe.engine.load import load
from melinoe.generate import trace_prompts
from melinoe.measure import reading_trace
from melinoe.shipped import GSM8K_TRAIN, HELD_OUT

PROMPT, COMPLETION = 64, 64
PIECES = 2  # of each document
MATHS = "gsm8k"
# The demo's settings train on the first 1,600 rows; these no run has seen.
FIRST_QUESTION, QUESTIONS = 1600, 200
MIXED_QUESTIONS = 24 * PIECES  # as many as of each other source
WRITTEN_QUESTIONS = 96
NEW_TOKENS = 25  # the first is the prompt's own; 24 are decoded


@dataclass(frozen=True)
class Item:
    """One request: where it is from, which document, which piece of it, and its tokens."""

    source: str
    document: int
    piece: int
    text: Encoded

    @property
    def prompt(self) -> list[int]:
        """Token ids before the completion."""
        pairs = zip(self.text.input_ids, self.text.completion_mask, strict=True)
        return [token for token, completion in pairs if not completion]


@dataclass(frozen=True)
class Model:
    """A model's name, its token embeddings, and what it chose on each of the items."""

    name: str
    path: Path
    embeddings: torch.Tensor
    fingerprint: str
    read: Trace
    written: Trace


def items_of(tokenizer: Any) -> list[Item]:
    """All requests; GSM8K's first."""
    questions = load_examples(GSM8K_TRAIN, limit=FIRST_QUESTION + QUESTIONS)[FIRST_QUESTION:]
    items = [Item(MATHS, k, 0, one) for k, one in enumerate(encode(questions, tokenizer, 512))]
    for file in sorted(HELD_OUT.glob("*.jsonl")):
        for document, example in enumerate(load_examples(file)):
            ids = tokenizer(example.prompt + example.completion)["input_ids"]
            for piece in range(min(PIECES, len(ids) // (PROMPT + COMPLETION))):
                start = piece * (PROMPT + COMPLETION)
                cut = Encoded(
                    list(ids[start : start + PROMPT + COMPLETION]),
                    [False] * PROMPT + [True] * COMPLETION,
                )
                items.append(Item(file.stem, document, piece, cut))
    return items


def mixed(items: Sequence[Item]) -> list[int]:
    """Rows of mixed traffic: seven sources in equal parts."""
    return [
        row
        for row, one in enumerate(items)
        if one.source != MATHS or one.document < MIXED_QUESTIONS
    ]


def written_rows(items: Sequence[Item]) -> list[int]:
    """Rows that are also answered: first pieces, and some of the questions."""
    return [
        row
        for row, one in enumerate(items)
        if (one.document < WRITTEN_QUESTIONS if one.source == MATHS else one.piece == 0)
    ]


def open_model(path: Path, slots: int | None = None, **options: Any) -> tuple[Any, Any, Any]:
    """A model in float32, all experts resident unless told; its handle and its tokenizer."""
    slots = slots or describe(str(path)).num_experts
    model, handle = load(str(path), "cpu", slots=slots, dtype=torch.float32, store="ram", **options)
    return model, handle, load_tokenizer(str(path), model.config)


def observe(name: str, path: Path, limit: int | None = None) -> tuple[Model, list[Item]]:
    """
    Let the model at *path* read all items and answer some of them.

    *limit* keeps so many documents of each corpus, and fewer questions, for trying the study.
    """
    model, handle, tokenizer = open_model(path)
    items = [
        one
        for one in items_of(tokenizer)
        if limit is None or one.document < limit + MIXED_QUESTIONS * (one.source == MATHS)
    ]
    read = reading_trace(model, handle, [one.text for one in items])
    prompts = [items[row].prompt for row in written_rows(items)]
    written = trace_prompts(model, handle, tokenizer, prompts, NEW_TOKENS)
    handle.detach()
    embeddings = model.get_input_embeddings().weight.detach().clone()
    return Model(name, path, embeddings, read.fingerprint, read, written), items


def in_order(trace: Trace, order: Sequence[int]) -> Trace:
    """Sequences of a trace in another order, as traffic would have brought them."""
    starts = np.searchsorted(trace.sequence, np.arange(trace.num_sequences + 1))
    rows = np.concatenate([np.arange(starts[k], starts[k + 1]) for k in order])
    lengths = [starts[k + 1] - starts[k] for k in order]
    passes = trace.forward[rows]
    new = np.concatenate([[True], (np.diff(passes) != 0) | (np.diff(trace.sequence[rows]) != 0)])
    return Trace(
        experts=trace.experts[rows],
        forward=(np.cumsum(new) - 1).astype(np.int32),
        sequence=np.repeat(np.arange(len(order)), lengths).astype(np.int32),
        kind=trace.kind[rows],
        num_experts=trace.num_experts,
        model=trace.model,
        fingerprint=trace.fingerprint,
    )
