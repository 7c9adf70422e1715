"""
Texts of seven kinds to train on, the same kinds held out, two more, and texts that change kind.

The kinds are the corpora that the base model was trained on and GSM8K. The two that no model here
has seen come with the libraries: C++ headers of torch, and what installed packages say of
themselves. A text is the beginning of a document; a long document gives two.
"""

import hashlib
import importlib.metadata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from melinoe.data import Encoded, Example, load_examples
from melinoe.shipped import GSM8K_TRAIN, HELD_OUT

PROMPT, LENGTH = 64, 256  # tokens of a held-out text
TRAINED_CHARACTERS = 1200
HELD = 48  # texts of a kind at most
GSM8K_HELD_FROM = 6000
UNSEEN = ("headers", "readmes")
CHANGED = "changed"


def trained(corpora: Path, per_kind: int) -> dict[str, list[Example]]:
    """
    Read *per_kind* texts of each kind, to be mixed by document.

    *corpora* is the directory that the base was trained from; the last 5 % of each are held out.
    """
    found = {"gsm8k": load_examples(GSM8K_TRAIN, limit=per_kind)}
    for path in sorted(corpora.glob("*.jsonl")):
        rows = load_examples(path)
        rows = rows[: int(0.95 * len(rows))][:per_kind]
        found[path.stem] = [
            Example("", row.completion[:TRAINED_CHARACTERS], row.source) for row in rows
        ]
    return found


def held_out(tokenizer: Any) -> dict[str, list[Encoded]]:
    """Encode the held-out texts of each kind, of the unseen ones, and those that change kind."""
    found = {
        path.stem: _pieces((one.completion for one in load_examples(path)), tokenizer)
        for path in sorted(HELD_OUT.glob("*.jsonl"))
    }
    rows = load_examples(GSM8K_TRAIN, limit=GSM8K_HELD_FROM + HELD)[GSM8K_HELD_FROM:]
    found["gsm8k"] = [_question(row, tokenizer) for row in rows]
    kinds = sorted(found)
    found["headers"] = _pieces(_headers(), tokenizer)
    found["readmes"] = _pieces(_readmes(), tokenizer)
    half, changed = LENGTH // 2, []
    for number in range(HELD):
        one, other = (found[kinds[(number + step) % len(kinds)]] for step in (0, 1 + number % 3))
        ids = one[number % len(one)].input_ids[:half] + other[number % len(other)].input_ids[:half]
        changed.append(_masked(ids, PROMPT))
    return {**found, CHANGED: changed}


def digest(texts: dict[str, list[Encoded]]) -> str:
    """Name the texts: two results with one digest were judged on the same tokens."""
    ids = [(kind, [one.input_ids for one in texts[kind]]) for kind in sorted(texts)]
    return hashlib.sha256(repr(ids).encode()).hexdigest()[:16]


def _masked(ids: list[int], prompt: int) -> Encoded:
    return Encoded(ids, [at >= prompt for at in range(len(ids))])


def _question(row: Example, tokenizer: Any) -> Encoded:
    prompt, answer = (
        tokenizer(text, verbose=False)["input_ids"] for text in (row.prompt, row.completion)
    )
    return _masked((prompt + answer)[:LENGTH], len(prompt))


def _pieces(documents: Iterable[str], tokenizer: Any) -> list[Encoded]:
    """The first piece of each document, then the second of each, until there are `HELD`."""
    cut = []
    for text in documents:
        ids = tokenizer(text, verbose=False)["input_ids"]
        cut.append([ids[at : at + LENGTH] for at in (0, LENGTH) if len(ids) >= at + LENGTH])
    pieces = [one[0] for one in cut if one] + [one[1] for one in cut if len(one) > 1]
    return [_masked(ids, PROMPT) for ids in pieces[:HELD]]


def _headers() -> Iterable[str]:
    """C++ without the licences at its head."""
    for path in sorted((Path(torch.__file__).parent / "include" / "ATen").glob("*.h")):
        text = path.read_text(errors="replace")
        if len(text) > 4000:
            yield text


def _readmes() -> Iterable[str]:
    for one in sorted(importlib.metadata.distributions(), key=lambda one: str(one.name).lower()):
        text = one.metadata.get_payload() or one.metadata["Description"] or ""
        if isinstance(text, str) and len(text) > 4000:
            yield text
