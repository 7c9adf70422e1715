"""Measure base, fine-tuned model and control alike, and record it in ``melinoe.json``."""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from melinoe.cache.curves import UnitCosts
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
from melinoe.data import Example, encode, encode_prompts
from melinoe.engine.load import load
from melinoe.errors import CheckpointError, DataError
from melinoe.evaluate import Perplexity, perplexity, perplexity_increase
from melinoe.generate import trace_prompts
from melinoe.measure import (
    completion_costs,
    locality_record,
    machine,
    rates_by_slots,
    reading_trace,
)
from melinoe.outcome.control import as_checkpoint, check_control
from melinoe.stats import paired_difference, paired_ratio

_CURVE_POINTS = 16
Texts = Mapping[str, Sequence[Example]]
Say = Callable[[str], None]
_POLICIES = ("lru", "lfu")  # the two that the cache loss imagines, as gamma nears 0 or 1
_OF_TRACE = ("experts_per_sequence", "experts_per_sequence_mean", "reuse", "distinct_experts")


@dataclass(frozen=True)
class Measured:
    """Results of one model."""

    shape: dict[str, int]  # experts, top-k and layers
    record: dict[str, Any]  # its part of ``melinoe.json``
    perplexities: dict[str, Perplexity]  # by name of the text
    # While ``writing`` and ``reading``: of each sequence, nan where nothing was written.
    experts: dict[str, np.ndarray]
    costs: dict[str, dict[str, UnitCosts]]  # likewise: policy to costs by slots and sequence


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
    """Measure one model as `record_outcome` does; of *sizes*, slots, all experts are the last."""
    model, handle = load(path, device, engine="reference", **(memory or {"slots": sizes[-1]}))
    tokenizer, length = load_tokenizer(str(path), model.config), settings.max_length
    perplexities = {
        name: perplexity(
            model, encode(examples[: settings.examples], tokenizer, length), settings.batch_size
        )
        for name, examples in {**held_out, **others}.items()
    }
    examples = next(iter(held_out.values()))[: settings.prompts]
    prompts = encode_prompts(examples, tokenizer, text_tokens=length)
    written = trace_prompts(model, handle, tokenizer, prompts, settings.max_new_tokens, say)
    read = reading_trace(model, handle, encode(examples, tokenizer, length))
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
    costs, traces = {}, {"writing": written, "reading": read}
    for name, trace in traces.items():
        costs[name] = {policy: completion_costs(trace, sizes, policy) for policy in _POLICIES}
        found = locality_record(trace, "")
        caches = {policy: rates_by_slots(sizes, one) for policy, one in costs[name].items()}
        record[name] = {key: found[key] for key in _OF_TRACE} | {"caches": caches}
    shape = {"num_experts": read.num_experts, "top_k": read.top_k, "layers": read.num_layers}
    experts = {name: experts_per_sequence(trace) for name, trace in traces.items()}
    return Measured(shape, record, perplexities, experts, costs)


def change_of(
    before: Measured, after: Measured, sizes: Sequence[int], compared: Sequence[int]
) -> dict[str, Any]:
    """
    Compare two models, paired by example, text by text and cache by cache.

    *before* is the base model, or the control, for the effect of the locality terms alone; of
    *sizes*, slots at which both were measured, they are *compared* at some; where nothing is loaded
    after, there is no ratio. DataError: no prompt got a completion from both.
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
        fewer: dict[str, Any] = {}
        for policy, a in after.costs[name].items():
            b = before.costs[name][policy]
            places = [i for i, size in enumerate(sizes) if size in compared and a.loads[i].any()]
            ratios = [paired_ratio(b.loads[i], a.loads[i], b.tokens, a.tokens) for i in places]
            fewer[policy] = {
                "slots": [sizes[i] for i in places],
                "ratio": [one.to_dict() for one in ratios],
            }
        experts = paired_difference(ours[both], theirs[both]).to_dict()
        found[name] = {"experts_per_sequence": experts, "transfers_per_token": fewer}
    return found


def record_outcome(
    directory: str | Path,
    base: str | Path,
    held_out: Texts,
    others: Texts | None = None,
    *,
    control: str | Path | None = None,
    settings: OutcomeSettings | None = None,
    device: str = "cpu",
    memory: Mapping[str, Any] | None = None,
    say: Say | None = None,
) -> dict[str, Any]:
    """
    Measure a fine-tuned checkpoint and its base, and write the outcome into its ``melinoe.json``.

    Smaller caches are simulated from traces, among them those of half and of double the slots that
    the model was trained for. With a *control*, the price and the saving of the locality terms are
    recorded too.

    Args:
        directory: The fine-tuned checkpoint, with the ``melinoe.json`` that fine-tuning wrote.
        base: The directory or hub name that it was fine-tuned from.
        held_out: One name to examples of the kind that it was fine-tuned on and never saw; their
            prompts are also answered and traced.
        others: Names to other texts, for the loss outside the domain.
        control: Directory of the run's control; an adapter alone is merged beside *directory* for
            a while.
        memory: What `melinoe.load` is given, as ``gpu_memory``; absent: all experts are resident.
            It changes no number.

    Returns:
        All of ``melinoe.json``.

    Raises:
        DataError: no held-out text, or one whose prompts get no completion.
        CheckpointError, WriteError: a checkpoint or its ``melinoe.json`` cannot be read, *control*
            is none of this run, or no room to merge it. If it is the control that fails, the
            outcome of the other two is recorded.
    """
    if len(held_out) != 1:
        raise DataError("name exactly one held-out text of the kind the model was fine-tuned on")
    settings = settings or OutcomeSettings()
    started = time.monotonic()
    metadata = read_metadata(directory)
    capacity = float(metadata.get("settings", {}).get("capacity", FinetuneSettings().capacity))
    num_experts = describe(str(directory)).num_experts
    slots = experts_in_share(capacity, num_experts)
    sizes, compared = cache_sizes(slots, num_experts), around(slots, num_experts)

    def measure(path: str | Path, what: str) -> Measured:
        if say is not None:
            say(f"measuring {what}")
        return measure_model(path, held_out, others or {}, sizes, settings, device, memory, say)

    before = measure(base, "the model before fine-tuning")
    after = measure(directory, "the model after fine-tuning")
    facts = machine()
    outcome = {
        "examples": min(settings.examples, len(next(iter(held_out.values())))),
        "prompts": len(after.experts["writing"]),
        "max_new_tokens": settings.max_new_tokens,
        "slots": slots,
        **after.shape,
        "before": before.record,
        "after": after.record,
        "change": change_of(before, after, sizes, compared),
        "machine": facts,
        "date": facts["date"],
        "seconds": round(time.monotonic() - started, 1),
    }
    recorded = update_metadata(directory, outcome=outcome)
    if control is None:
        return recorded
    known = check_control(control, recorded)
    with as_checkpoint(control, base, directory) as path:
        plain = measure(path, "its control")
    if plain.shape != after.shape:
        raise CheckpointError(
            f"{control} is of another shape than {directory}; give a control of the same base"
        )
    run: dict[str, Any] = {"name": Path(control).expanduser().resolve().name}
    run |= {name: known.get(name) for name in ("fingerprint", "settings")}
    outcome |= {"control": plain.record, "control_run": run}
    outcome["change_from_control"] = change_of(plain, after, sizes, compared)
    outcome["seconds"] = round(time.monotonic() - started, 1)
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
    Record a checkpoint's base and data in ``melinoe.json``, and return all of the file.

    *source* is the training data as it was given, *examples* those that were trained on, *more*
    further facts about the data, such as how many examples were held out. Raises as
    `read_metadata`.
    """
    known = read_metadata(directory)
    data = {**(known.get("data") or {}), **describe_data(source, examples, split), **more}
    return update_metadata(directory, **describe_base(base), data=data)


def around(slots: int, num_experts: int) -> list[int]:
    """Return half the slots, the slots and double the slots, as far as they exist."""
    return sorted({max(1, slots // 2), slots, min(num_experts, 2 * slots)})


def cache_sizes(slots: int, num_experts: int) -> list[int]:
    """Return about sixteen sizes up to all experts, with *slots*, half and double of it."""
    step = max(1, num_experts // _CURVE_POINTS)
    return sorted({*range(step, num_experts + 1, step), *around(slots, num_experts), num_experts})
