"""
What fine-tuning bought and what it cost: the base and the fine-tuned model, measured alike.

Both answer the same held-out prompts and read the same held-out texts, so that every change is
paired. The result goes into the checkpoint's ``melinoe.json``, from which its card is written.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from melinoe.cache.locality import experts_per_sequence
from melinoe.checkpoint import (
    describe,
    describe_base,
    describe_data,
    load_tokenizer,
    read_metadata,
    update_metadata,
)
from melinoe.config import FinetuneSettings, OutcomeSettings, experts_in_share
from melinoe.data import Example, encode, encode_prompt
from melinoe.errors import DataError
from melinoe.evaluate import Perplexity, perplexity, perplexity_increase
from melinoe.generate import trace_prompts
from melinoe.measure import completion_counts, locality_record, machine
from melinoe.runtime.load import load
from melinoe.stats import Estimate, bootstrap, paired_difference, paired_ratio

Texts = Mapping[str, Sequence[Example]]
Say = Callable[[str], None]
_POLICIES = ("lru", "lfu")  # the two that the loss imagines, as gamma nears 0 or 1
_CURVE_POINTS = 16


@dataclass(frozen=True)
class _Measured:
    """One model: what ``melinoe.json`` keeps of it, and what pairing needs besides."""

    record: dict[str, Any]
    shape: dict[str, int]
    perplexities: dict[str, Perplexity]
    experts: np.ndarray  # float64 (prompts,), nan where nothing was written
    counts: dict[str, dict[int, dict[str, list[int]]]]


def record_outcome(
    directory: str | Path,
    base: str | Path,
    held_out: Texts,
    others: Texts | None = None,
    *,
    settings: OutcomeSettings | None = None,
    device: str = "cpu",
    say: Say | None = None,
) -> dict[str, Any]:
    """
    Measure a fine-tuned checkpoint and its base, and write the outcome into its ``melinoe.json``.

    Args:
        directory: The fine-tuned checkpoint, with the ``melinoe.json`` that fine-tuning wrote.
        base: The checkpoint it was fine-tuned from: a directory or hub name.
        held_out: One name to examples of the kind that it was fine-tuned on and never saw; their
            prompts are also answered and traced.
        others: Names to other texts, for what was lost outside the domain.
        settings: How much to measure.
        device: Where the models run.
        say: Told of progress.

    Returns:
        All of ``melinoe.json``.

    Raises:
        DataError: no held-out text, or one whose prompts get no completion.
        CheckpointError: a checkpoint or its ``melinoe.json`` cannot be read.
    """
    sized = settings or OutcomeSettings()
    metadata = read_metadata(directory)
    capacity = float(metadata.get("settings", {}).get("capacity", FinetuneSettings().capacity))
    outcome = measure_outcome(base, directory, held_out, others, capacity, sized, device, say)
    return update_metadata(directory, outcome=outcome)


def record_origin(
    directory: str | Path,
    base: str | Path,
    source: str | Path | None,
    examples: Sequence[Example],
    split: str | None = None,
    **more: Any,
) -> dict[str, Any]:
    """
    Write into ``melinoe.json`` what a checkpoint was made from, and return all of the file.

    Args:
        directory: The checkpoint.
        base: The checkpoint that it was fine-tuned from.
        source: The training data, as it was given.
        examples: What of it was trained on.
        split: Split of a hub data set.
        more: Further facts about the data, such as how many examples were held out.

    Raises:
        CheckpointError: as `read_metadata`.
    """
    data = {**describe_data(source, examples, split), **more}
    kept = read_metadata(directory).get("data") or {}
    return update_metadata(directory, **describe_base(base), data={**kept, **data})


def measure_outcome(
    base: str | Path,
    tuned: str | Path,
    held_out: Texts,
    others: Texts | None = None,
    capacity: float = 0.25,
    settings: OutcomeSettings | None = None,
    device: str = "cpu",
    say: Say | None = None,
) -> dict[str, Any]:
    """
    Measure both models with every expert resident, and simulate smaller caches from their traces.

    Args:
        base: The model before.
        tuned: The model after.
        held_out: As in `record_outcome`.
        others: As in `record_outcome`.
        capacity: Share of a layer's experts that the model was trained for; half and double of it
            are among the cache sizes.
        settings: How much to measure.
        device: Where the models run.
        say: Told of progress.

    Returns:
        What ``melinoe.json`` keeps as ``outcome``; see `melinoe.checkpoint.metadata_schema`.

    Raises:
        DataError, CheckpointError: as `record_outcome`.
    """
    if len(held_out) != 1:
        raise DataError("name exactly one held-out text of the kind the model was fine-tuned on")
    settings = settings or OutcomeSettings()
    started = time.monotonic()
    about = describe(str(tuned))
    slots = experts_in_share(capacity, about.num_experts)
    sizes = cache_sizes(slots, about.num_experts)
    found = {}
    for name, path in (("before", base), ("after", tuned)):
        if say is not None:
            say(f"measuring the model {name} fine-tuning")
        found[name] = _measure(path, held_out, others or {}, sizes, settings, device, say)
    before, after = found["before"], found["after"]
    return {
        "examples": min(settings.examples, len(next(iter(held_out.values())))),
        "prompts": len(after.experts),
        "max_new_tokens": settings.max_new_tokens,
        "slots": slots,
        **after.shape,
        "before": before.record,
        "after": after.record,
        "change": _change(before, after, [s for s in sizes if s in around(slots, sizes[-1])]),
        "machine": machine(),
        "date": machine()["date"],
        "seconds": round(time.monotonic() - started, 1),
    }


def around(slots: int, num_experts: int) -> list[int]:
    """Half the slots, the slots, double the slots, as far as they are different and exist."""
    return sorted({max(1, slots // 2), slots, min(num_experts, 2 * slots)})


def cache_sizes(slots: int, num_experts: int) -> list[int]:
    """About sixteen sizes from few to all experts, *slots*, half and double of it among them."""
    step = max(1, num_experts // _CURVE_POINTS)
    return sorted({*range(step, num_experts + 1, step), *around(slots, num_experts), num_experts})


def _measure(
    path: str | Path,
    held_out: Texts,
    others: Texts,
    sizes: Sequence[int],
    settings: OutcomeSettings,
    device: str,
    say: Say | None,
) -> _Measured:
    model, handle = load(path, device, slots=sizes[-1])
    tokenizer = load_tokenizer(str(path), model.config)
    try:
        perplexities = {
            name: perplexity(
                model,
                encode(examples[: settings.examples], tokenizer, settings.max_length),
                settings.batch_size,
            )
            for name, examples in {**held_out, **others}.items()
        }
        examples = next(iter(held_out.values()))[: settings.prompts]
        prompts = [prompt_of(example, tokenizer, settings.max_length) for example in examples]
        trace = trace_prompts(model, handle, tokenizer, prompts, settings.max_new_tokens, say)
    finally:
        handle.detach()
    counts = {
        policy: {size: completion_counts(trace, size, policy) for size in sizes}
        for policy in _POLICIES
    }
    locality = locality_record(trace, "")
    keys = ("experts_per_sequence", "experts_per_sequence_mean", "reuse", "distinct_experts")
    record = {
        "perplexity": {
            name: {
                "in_domain": name in held_out,
                "tokens": int(one.tokens.sum()),
                "perplexity": one.estimate.to_dict(),
            }
            for name, one in perplexities.items()
        },
        **{key: locality[key] for key in keys},
        "caches": {policy: _curve(by_size) for policy, by_size in counts.items()},
    }
    shape = {key: locality[key] for key in ("num_experts", "top_k", "layers")}
    return _Measured(record, shape, perplexities, experts_per_sequence(trace), counts)


def _curve(by_size: Mapping[int, dict[str, list[int]]]) -> dict[str, Any]:
    """Hit rate and transfers per token of completions, by slots."""
    return {
        "slots": list(by_size),
        "hit_rate": [bootstrap(one["hits"], one["uses"]).to_dict() for one in by_size.values()],
        "transfers_per_token": [
            bootstrap(one["loads"], one["tokens"]).to_dict() for one in by_size.values()
        ],
    }


def prompt_of(example: Example, tokenizer: Any, max_length: int) -> list[int]:
    """
    The prompt that a trace starts from: the example's own, or of plain text its first half.

    At most half of *max_length* of a plain text, so that what follows is still like training.
    """
    if example.prompt or example.messages is not None:
        return encode_prompt(example, tokenizer)
    ids = encode([example], tokenizer, max_length)[0].input_ids
    return ids[: max(1, len(ids) // 2)]


def _change(before: _Measured, after: _Measured, sizes: Sequence[int]) -> dict[str, Any]:
    """After against before, paired by example, text by text and cache by cache."""
    transfers: dict[str, dict[str, list[Any]]] = {}
    for policy, by_size in after.counts.items():
        transfers[policy] = {"slots": [], "ratio": []}
        for size in sizes:
            ours, theirs = by_size[size], before.counts[policy][size]
            if not sum(ours["loads"]):  # nothing left to divide by
                continue
            # Before over after: how many times fewer.
            ratio = paired_ratio(theirs["loads"], ours["loads"], theirs["tokens"], ours["tokens"])
            transfers[policy]["slots"].append(size)
            transfers[policy]["ratio"].append(ratio.to_dict())
    return {
        "perplexity": {
            name: perplexity_increase(one, before.perplexities[name]).to_dict()
            for name, one in after.perplexities.items()
        },
        "experts_per_sequence": _paired_experts(before, after).to_dict(),
        "transfers_per_token": transfers,
    }


def _paired_experts(before: _Measured, after: _Measured) -> Estimate:
    """Difference in experts per sequence, over the prompts that both models answered."""
    both = ~(np.isnan(before.experts) | np.isnan(after.experts))
    if not both.any():
        raise DataError("no prompt got a completion from both models; measure on other prompts")
    return paired_difference(after.experts[both], before.experts[both])
