"""One model, before or after fine-tuning: what it loses on texts, and how it routes."""

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
from melinoe.evaluate import Perplexity, perplexity
from melinoe.generate import trace_prompts
from melinoe.measure import completion_counts, locality_record, reading_trace
from melinoe.stats import bootstrap

Texts = Mapping[str, Sequence[Example]]
Say = Callable[[str], None]
_POLICIES = ("lru", "lfu")  # the two that the loss imagines, as gamma nears 0 or 1


@dataclass(frozen=True)
class LocalityOf:
    """What one trace showed: what ``melinoe.json`` keeps of it, and what pairing needs besides."""

    record: dict[str, Any]
    experts: np.ndarray  # float64 (sequences,), nan where nothing was written
    counts: dict[str, dict[int, dict[str, list[int]]]]


@dataclass(frozen=True)
class Measured:
    """What one model showed: perplexity of each text, locality while writing and reading."""

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
    record = {
        **{key: found[key] for key in keys},
        "caches": {policy: _curve(by_size) for policy, by_size in counts.items()},
    }
    return LocalityOf(record, experts_per_sequence(trace), counts)


def record_of(one: Measured, held_out: Texts) -> dict[str, Any]:
    """What ``melinoe.json`` keeps of one model."""
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


def _curve(by_size: Mapping[int, dict[str, list[int]]]) -> dict[str, Any]:
    """Hit rate and transfers per token of completions, by slots."""
    return {
        "slots": list(by_size),
        "hit_rate": [bootstrap(one["hits"], one["uses"]).to_dict() for one in by_size.values()],
        "transfers_per_token": [
            bootstrap(one["loads"], one["tokens"]).to_dict() for one in by_size.values()
        ],
    }
