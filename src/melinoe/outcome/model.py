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
class Measured:
    """
    Results of one model.

    Attributes:
        shape: Experts, top-k and layers.
        record: Its part of ``melinoe.json``.
        perplexities: By name of the text.
        experts: While ``writing`` and ``reading``: of each sequence, nan where nothing was written.
        counts: Likewise: policy to slots to counts by sequence.
    """

    shape: dict[str, int]
    record: dict[str, Any]
    perplexities: dict[str, Perplexity]
    experts: dict[str, np.ndarray]
    counts: dict[str, dict[str, dict[int, Counts]]]


def measure_model(
    path: str | Path,
    held_out: Texts,
    others: Texts,
    sizes: Sequence[int],
    settings: OutcomeSettings,
    device: str,
    memory: Mapping[str, Any] | None,
    say: Say | None,
) -> Measured:
    """
    Measure one model; arguments and errors as `record_outcome`'s.

    Args:
        sizes: Cache sizes to simulate, all experts the last.
    """
    model, handle = load(path, device, engine="reference", **(memory or {"slots": sizes[-1]}))
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
    record: dict[str, Any] = {
        "perplexity": {
            name: {
                "in_domain": name in held_out,
                "tokens": int(found.tokens.sum()),
                "perplexity": found.estimate.to_dict(),
            }
            for name, found in perplexities.items()
        }
    }
    counts = {}
    for name, trace in traces.items():
        counts[name] = {
            policy: {size: completion_counts(trace, size, policy) for size in sizes}
            for policy in _POLICIES
        }
        record[name] = _locality(trace, counts[name])
    trace = traces["writing"]
    shape = {"num_experts": trace.num_experts, "top_k": trace.top_k, "layers": trace.num_layers}
    experts = {name: experts_per_sequence(trace) for name, trace in traces.items()}
    return Measured(shape, record, perplexities, experts, counts)


def _locality(trace: Trace, counts: Mapping[str, Mapping[int, Counts]]) -> dict[str, Any]:
    """The part of ``melinoe.json`` that is of one trace."""
    found = locality_record(trace, "")
    keys = ("experts_per_sequence", "experts_per_sequence_mean", "reuse", "distinct_experts")

    def curve(by_size: Mapping[int, Counts], top: str, bottom: str) -> list[Any]:
        return [bootstrap(one[top], one[bottom]).to_dict() for one in by_size.values()]

    caches = {
        policy: {
            "slots": list(by_size),
            "hit_rate": curve(by_size, "hits", "uses"),
            "transfers_per_token": curve(by_size, "loads", "tokens"),
        }
        for policy, by_size in counts.items()
    }
    return {**{key: found[key] for key in keys}, "caches": caches}


def change_of(before: Measured, after: Measured, sizes: Sequence[int]) -> dict[str, Any]:
    """
    Compare two models, paired by example, text by text and cache by cache.

    Args:
        before: The base model; or the control, for the effect of the locality terms alone.
        after: The fine-tuned model.
        sizes: Slots of the caches to compare at; those without loads after have no ratio.

    Raises:
        DataError: no prompt got a completion from both.
    """
    found: dict[str, Any] = {
        "perplexity": {
            name: perplexity_increase(one, before.perplexities[name]).to_dict()
            for name, one in after.perplexities.items()
        }
    }
    for name, ours in after.experts.items():
        theirs = before.experts[name]
        both = ~(np.isnan(theirs) | np.isnan(ours))
        if not both.any():
            raise DataError("no prompt got a completion from both models; measure on other prompts")
        found[name] = {
            "experts_per_sequence": paired_difference(ours[both], theirs[both]).to_dict(),
            "transfers_per_token": {
                policy: _times_fewer(before.counts[name][policy], by_size, sizes)
                for policy, by_size in after.counts[name].items()
            },
        }
    return found


def _times_fewer(
    before: Mapping[int, Counts], after: Mapping[int, Counts], sizes: Sequence[int]
) -> dict[str, list[Any]]:
    """Transfers per token before over after, by slots."""
    kept = [size for size in sizes if sum(after[size]["loads"])]
    pairs = [(before[size], after[size]) for size in kept]
    ratios = [paired_ratio(b["loads"], a["loads"], b["tokens"], a["tokens"]) for b, a in pairs]
    return {"slots": kept, "ratio": [one.to_dict() for one in ratios]}
