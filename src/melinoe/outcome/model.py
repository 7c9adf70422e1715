"""Measure one model on texts, in loss and in routing, and compare two models, paired."""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from melinoe.cache.locality import experts_per_sequence
from melinoe.cache.trace import Trace
from melinoe.checkpoint import load_tokenizer
from melinoe.config import OutcomeSettings
from melinoe.data import Example, encode, encode_prompts
from melinoe.engine.load import load
from melinoe.errors import DataError
from melinoe.evaluate import Perplexity, perplexity, perplexity_increase
from melinoe.generate import trace_prompts
from melinoe.measure import completion_counts, locality_record, reading_trace
from melinoe.stats import bootstrap, paired_difference, paired_ratio

Texts = Mapping[str, Sequence[Example]]
Say = Callable[[str], None]
Counts = dict[str, list[int]]
_POLICIES = ("lru", "lfu")  # the two that the cache loss imagines, as gamma nears 0 or 1


@dataclass(frozen=True)
class LocalityOf:
    """Locality of one trace: the part that ``melinoe.json`` keeps, and what pairing needs."""

    record: dict[str, Any]
    experts: np.ndarray  # float64 (sequences,), nan where nothing was written
    counts: dict[str, dict[int, Counts]]


@dataclass(frozen=True)
class Measured:
    """Results of one model: perplexity of each text, locality while writing and reading."""

    shape: dict[str, int]
    perplexities: dict[str, Perplexity]
    localities: dict[str, LocalityOf]  # writing, reading


def measure_model(
    path: str | Path,
    held_out: Texts,
    others: Texts,
    sizes: Sequence[int],
    settings: OutcomeSettings,
    device: str,
    say: Say | None,
) -> Measured:
    """
    Measure one model with every expert resident.

    Args:
        path: Its checkpoint.
        held_out: One name to held-out examples, whose prompts it answers and whose text it reads.
        others: Names to other texts.
        sizes: Cache sizes to simulate, all experts the last.
        settings: How much to measure.
        device: Where it runs.
        say: Told of progress.

    Raises:
        DataError, CheckpointError: as `record_outcome`.
    """
    model, handle = load(path, device, engine="reference", slots=sizes[-1])
    tokenizer = load_tokenizer(str(path), model.config)
    perplexities = {
        name: perplexity(
            model,
            encode(examples[: settings.examples], tokenizer, settings.max_length),
            settings.batch_size,
        )
        for name, examples in {**held_out, **others}.items()
    }
    examples = next(iter(held_out.values()))[: settings.prompts]
    prompts = encode_prompts(examples, tokenizer, text_tokens=settings.max_length)
    traces = {
        "writing": trace_prompts(model, handle, tokenizer, prompts, settings.max_new_tokens, say),
        "reading": reading_trace(model, handle, encode(examples, tokenizer, settings.max_length)),
    }
    # The next model needs the room; detaching would first want the experts a third time.
    del model, handle
    gc.collect()
    trace = traces["writing"]
    shape = {
        "num_experts": trace.num_experts,
        "top_k": trace.top_k,
        "layers": trace.num_layers,
    }
    localities = {name: _locality(trace, sizes) for name, trace in traces.items()}
    return Measured(shape, perplexities, localities)


def _locality(trace: Trace, sizes: Sequence[int]) -> LocalityOf:
    counts = {
        policy: {size: completion_counts(trace, size, policy) for size in sizes}
        for policy in _POLICIES
    }
    found = locality_record(trace, "")
    keys = ("experts_per_sequence", "experts_per_sequence_mean", "reuse", "distinct_experts")
    caches = {
        policy: {
            "slots": list(by_size),
            **{
                name: [bootstrap(one[top], one[bottom]).to_dict() for one in by_size.values()]
                for name, top, bottom in (
                    ("hit_rate", "hits", "uses"),
                    ("transfers_per_token", "loads", "tokens"),
                )
            },
        }
        for policy, by_size in counts.items()
    }
    record = {**{key: found[key] for key in keys}, "caches": caches}
    return LocalityOf(record, experts_per_sequence(trace), counts)


def record_of(one: Measured, held_out: Texts) -> dict[str, Any]:
    """Return the part of ``melinoe.json`` that is of one model."""
    return {
        "perplexity": {
            name: {
                "in_domain": name in held_out,
                "tokens": int(found.tokens.sum()),
                "perplexity": found.estimate.to_dict(),
            }
            for name, found in one.perplexities.items()
        },
        **{name: locality.record for name, locality in one.localities.items()},
    }


def change_of(before: Measured, after: Measured, sizes: Sequence[int]) -> dict[str, Any]:
    """
    Compare two models, paired by example, text by text and cache by cache.

    Args:
        before: The base model; or the control, for the effect of the locality terms alone.
        after: The fine-tuned model.
        sizes: Slots of the caches to compare at.

    Raises:
        DataError: no prompt got a completion from both.
    """
    found: dict[str, Any] = {
        "perplexity": {
            name: perplexity_increase(one, before.perplexities[name]).to_dict()
            for name, one in after.perplexities.items()
        }
    }
    for name, one in after.localities.items():
        other = before.localities[name]
        both = ~(np.isnan(other.experts) | np.isnan(one.experts))
        if not both.any():
            raise DataError("no prompt got a completion from both models; measure on other prompts")
        found[name] = {
            "experts_per_sequence": paired_difference(
                one.experts[both], other.experts[both]
            ).to_dict(),
            "transfers_per_token": {
                policy: _times_fewer(other.counts[policy], by_size, sizes)
                for policy, by_size in one.counts.items()
            },
        }
    return found


def _times_fewer(
    before: Mapping[int, Counts], after: Mapping[int, Counts], sizes: Sequence[int]
) -> dict[str, list[Any]]:
    """Transfers per token before over after, by slots; sizes without loads after have no ratio."""
    kept = [size for size in sizes if sum(after[size]["loads"])]
    ratios = []
    for size in kept:
        theirs, ours = before[size], after[size]
        ratio = paired_ratio(theirs["loads"], ours["loads"], theirs["tokens"], ours["tokens"])
        ratios.append(ratio.to_dict())
    return {"slots": kept, "ratio": ratios}
