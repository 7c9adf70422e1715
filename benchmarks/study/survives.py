"""
Does locality survive what fine-tuning never saw?

Takes checkpoints that the study kept and the shipped model, and counts transfers per token under
conditions other than those trained for (answers of at most 200 tokens, one at a time):

    answers     held-out GSM8K answers, read: the measure of the study, for comparison
    long        questions and answers one after the other up to the model's 512 tokens, read
    mixed       the same, each followed by a piece of another corpus, in one sequence, read
    batch of 4  four held-out answers at once, each pass needing what any of its rows needs
    greedy      completions that the model writes itself
    sampled     the same, drawn at temperature 1
    written on  sampled completions that may not end: the tokens past the 200th

Bad news would be: a ratio to the base model near 1 where the study's own measure has a high one.

Not measured here: quality (the study has it), speed.
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from judge import COMPLETION
from kept import done, given, parser
from plan import JUDGED_FROM

from melinoe.cache.simulator import simulate
from melinoe.cache.trace import COMPLETION_ROW, PADDING_ROW, Trace
from melinoe.checkpoint import describe, load_tokenizer
from melinoe.data import Encoded, Example, encode, load_examples
from melinoe.engine.load import load
from melinoe.generate import trace_prompts
from melinoe.measure import append_jsonl, machine, reading_trace
from melinoe.shipped import GSM8K_TRAIN, HELD_OUT

CONTEXT, TRAINED = 512, 200
ANSWERS, LONG, PROMPTS, ON = 128, 32, 24, 6
BATCH = 4
CACHES = ((8, "lru"), (8, "lfu"))


def measure(path: str, seed: int, name: str) -> dict[str, Any]:
    """Transfers per token of one checkpoint under every condition."""
    model, handle = load(path, "cpu", slots=describe(path).num_experts, dtype=torch.float32)
    tokenizer = load_tokenizer(path, model.config)
    held_out = load_examples(GSM8K_TRAIN)[JUDGED_FROM : JUDGED_FROM + 6 * ANSWERS]
    answers = encode(held_out[:ANSWERS], tokenizer, CONTEXT)
    prompts = [one.prompt for one in held_out[:PROMPTS]]

    def written(count: int, tokens: int, **options: Any) -> Trace:
        torch.manual_seed(seed)
        return trace_prompts(model, handle, tokenizer, prompts[:count], tokens, **options)

    drawn = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    read = reading_trace(model, handle, answers)
    no_end = {"suppress_tokens": [model.generation_config.eos_token_id]}
    traces: dict[str, Callable[[], Trace]] = {
        "answers": lambda: read,
        "long": lambda: reading_trace(model, handle, long_texts(held_out, tokenizer)),
        "mixed": lambda: reading_trace(model, handle, long_texts(held_out, tokenizer, others())),
        f"batch of {BATCH}": lambda: in_batches(read, BATCH),
        "greedy": lambda: written(PROMPTS, 64),
        "sampled": lambda: written(PROMPTS, 64, **drawn),
        "written on": lambda: only_after(written(ON, 360, **drawn, **no_end), TRAINED),
    }
    found = {condition: caches(make()) for condition, make in traces.items()}
    handle.detach()
    about = {"kind": "survival", "name": name, "seed": seed}
    return {**about, "conditions": found, "machine": machine()}


def others() -> list[Example]:
    """Documents of the other corpora, in a fixed mixed order."""
    texts = [one for file in sorted(HELD_OUT.glob("*.jsonl")) for one in load_examples(file)]
    random.Random(0).shuffle(texts)
    return texts


def long_texts(
    held_out: Sequence[Example], tokenizer: Any, between: Sequence[Example] | None = None
) -> list[Encoded]:
    """Texts of `CONTEXT` tokens: examples in turn, each with a piece of *between* behind it."""
    parts = [one.input_ids for one in encode(list(held_out), tokenizer, CONTEXT)]
    pieces = [one.input_ids for one in encode(list(between), tokenizer, CONTEXT)] if between else []
    made, ids, other = [], [], 0
    for part in parts:
        ids += part
        if pieces:
            ids += pieces[other % len(pieces)][:TRAINED]
            other += 1
        if len(ids) >= CONTEXT:
            made.append(Encoded(ids[:CONTEXT], [False] * 8 + [True] * (CONTEXT - 8)))
            ids = []
        if len(made) == LONG:
            break
    return made


def in_batches(trace: Trace, size: int) -> Trace:
    """*size* sequences after the other as if decoded together: their n-th tokens in one pass."""
    order, forward, kind = [], [], trace.kind.copy()
    rows_of = [np.flatnonzero(trace.sequence == one) for one in np.unique(trace.sequence)]
    passes = 0
    for first in range(0, len(rows_of) - size + 1, size):
        group = rows_of[first : first + size]
        prompts = [rows[trace.kind[rows] != COMPLETION_ROW] for rows in group]
        answers = [rows[trace.kind[rows] == COMPLETION_ROW] for rows in group]
        together = np.concatenate(prompts)
        order.append(together)
        forward.append(np.full(len(together), passes))
        passes += 1
        for step in range(max(map(len, answers))):
            now = np.array([rows[step] for rows in answers if step < len(rows)])
            order.append(now)
            forward.append(np.full(len(now), passes))
            passes += 1
    rows = np.concatenate(order)
    return replace(
        trace,
        experts=trace.experts[rows],
        forward=np.concatenate(forward).astype(np.int32),
        sequence=trace.sequence[rows],
        kind=kind[rows],
    )


def only_after(trace: Trace, tokens: int) -> Trace:
    """Count a sequence's completion from its *tokens*-th token on; what is before only warms."""
    kind = trace.kind.copy()
    for one in np.unique(trace.sequence):
        rows = np.flatnonzero(trace.sequence == one)
        early = rows[:tokens]
        kind[early[kind[early] != PADDING_ROW]] = 0
    return replace(trace, kind=kind)


def caches(trace: Trace) -> dict[str, Any]:
    """Loads on demand and tokens of each unit's completion, from a cold cache."""
    out: dict[str, Any] = {}
    for slots, policy in CACHES:
        done = simulate(trace, slots, policy, reset_between_sequences=True)
        units = done.per_sequence
        out[f"{policy}-{slots}"] = [int(one.loads[COMPLETION].sum()) for one in units]
        out["tokens"] = [int(one.tokens[COMPLETION]) for one in units]
    return out


def main() -> None:
    arguments = parser(__doc__, "survival.jsonl").parse_args()
    there = done(arguments.out, "name", "seed")
    for name, seed, path in given(arguments.checkpoints):
        if (name, seed) in there:
            continue
        result = measure(path, seed, name)
        append_jsonl(arguments.out, result)
        rates = {
            condition: round(sum(one["lfu-8"]) / sum(one["tokens"]), 3)
            for condition, one in result["conditions"].items()
        }
        print(json.dumps({"name": name, "seed": seed, **rates}), flush=True)


if __name__ == "__main__":
    main()
