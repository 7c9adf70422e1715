"""Turn a trace into the records that a report shows: locality, curves by slots, texts read."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from melinoe.cache.curves import UnitCosts, unit_costs
from melinoe.cache.locality import distinct_experts, experts_per_sequence, popularity, reuse
from melinoe.cache.simulator import COMPILED_POLICIES
from melinoe.cache.trace import COMPLETION_ROW, PROMPT_ROW, Trace
from melinoe.config import QUARTER, experts_in_share
from melinoe.data import Encoded
from melinoe.engine.handle import Handle
from melinoe.errors import DataError
from melinoe.stats import bootstrap

# A curve is drawn through so many numbers of slots at most.
_POINTS = 16


def trace_records(
    trace: Trace,
    model: str,
    policies: Sequence[str] = COMPILED_POLICIES,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> list[dict[str, Any]]:
    """
    Return a record of kind ``locality`` and of each policy one of kind ``curve``, of completions.

    Every sequence starts from an empty cache. Popularity, which the policy ``static`` goes by, is
    counted on the trace itself: with hindsight, which is that policy's best case. A compiled policy
    takes seconds, any other minutes; *progress* is told how many of how many replays are done.
    """
    names = list(dict.fromkeys(policies))
    sizes = np.unique(np.linspace(min(trace.top_k, trace.num_experts), trace.num_experts, _POINTS))
    slots = sorted({int(size) for size in sizes} | {experts_in_share(QUARTER, trace.num_experts)})
    done = iter(range(1, len(names) * len(slots) + 1))

    def step() -> None:
        progress(next(done), len(names) * len(slots))

    found = [locality_record(trace, model)]
    for name in names:
        given = {"popularity": popularity(trace)} if name == "static" else {}
        found.append(curve_record(trace, model, name, slots, progress=step, **given))
        del found[-1]["policy_options"]  # popularity is too long for a record
    return found


def locality_record(trace: Trace, model: str) -> dict[str, Any]:
    """
    Return the record of kind ``locality``, of completion tokens alone.

    ``experts_per_sequence`` holds one mean over layers per sequence, ``distinct_experts`` the mean
    over layers of what the whole trace used: small there is collapse, small per sequence is
    locality.
    """
    used = experts_per_sequence(trace)
    used = used[~np.isnan(used)]
    if used.size == 0:
        raise DataError("the trace has no completion tokens; generate at least two per prompt")
    again = reuse(trace)
    return {
        "kind": "locality",
        "model": model,
        "num_experts": trace.num_experts,
        "top_k": trace.top_k,
        "layers": trace.num_layers,
        "experts_per_sequence": used.tolist(),
        "experts_per_sequence_mean": bootstrap(used).to_dict(),
        "reuse": bootstrap(again[~np.isnan(again)]).to_dict(),
        "distinct_experts": float(distinct_experts(trace).mean()),
    }


def curve_record(
    trace: Trace,
    model: str,
    policy: str,
    slots: Sequence[int],
    progress: Callable[[], None] = lambda: None,
    **policy_options: Any,
) -> dict[str, Any]:
    """
    Return the record of kind ``curve``: hit rate and transfers of completions by slots, simulated.

    *slots* are numbers per layer to try; *progress* is called once for each that is done.
    """
    costs = completion_costs(trace, slots, policy, progress, **policy_options)
    about = {"kind": "curve", "model": model, "policy": policy, "policy_options": policy_options}
    return {**about, "num_experts": trace.num_experts, **rates_by_slots(slots, costs)}


def completion_costs(
    trace: Trace,
    slots: Sequence[int],
    policy: str,
    progress: Callable[[], None] = lambda: None,
    **policy_options: Any,
) -> UnitCosts:
    """Simulate caches of each size, empty before every sequence; count what completions cost."""
    options: Any = {"policy_options": policy_options, "reset_between_sequences": True}
    return unit_costs(trace, slots, policy, progress=progress, **options)


def rates_by_slots(slots: Sequence[int], costs: UnitCosts) -> dict[str, Any]:
    """Estimate hit rate and transfers per token with each number of *slots*."""
    return {
        "slots": list(slots),
        "hit_rate": [bootstrap(hits, costs.uses).to_dict() for hits in costs.hits],
        "transfers_per_token": [bootstrap(one, costs.tokens).to_dict() for one in costs.loads],
    }


def reading_trace(model: Any, handle: Handle, encoded: Sequence[Encoded]) -> Trace:
    """
    Record which experts every token of *encoded* chose, laid out as generation would have it.

    Traces of a model's own completions mix how it routes with what it writes; one that repeats
    itself needs few experts. Reading the same text, two models differ in routing alone.

    A token's routing depends on the tokens before it alone, so one forward pass per example
    gives what decoding that text would give, up to rounding: the prompt in one pass, then each
    completion token in its own. One sequence per example, in order.
    """
    if not encoded:
        raise DataError("there is no text to read; give at least one example")
    device = model.get_input_embeddings().weight.device
    was_training = model.training
    model.eval()
    try:
        with handle.record() as recorder, torch.inference_mode():
            for one in encoded:
                ids = torch.tensor([one.input_ids], device=device)
                model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        trace = recorder.trace("read, not written")
    finally:
        model.train(was_training)
    is_completion = np.concatenate([np.asarray(one.completion_mask) for one in encoded])
    starts = np.zeros(len(is_completion), dtype=bool)
    starts[np.cumsum([0, *(len(one) for one in encoded[:-1])])] = True
    # A pass begins with each example, each completion token, and the prompt's turn after one.
    follows = np.concatenate([[False], is_completion[:-1]])
    forward = np.cumsum(starts | is_completion | follows) - 1
    return replace(
        trace,
        forward=forward.astype(np.int32),
        sequence=(np.cumsum(starts) - 1).astype(np.int32),
        kind=np.where(is_completion, COMPLETION_ROW, PROMPT_ROW).astype(np.uint8),
    )


def reading_record(trace: Trace, model: str, slots: int, policy: str) -> dict[str, Any]:
    """
    Return the record of kind ``reading``: transfers per token of texts that were read, simulated.

    Every text starts from an empty cache; what its prompt loads is not counted.
    """
    costs = completion_costs(trace, [slots], policy)
    own = np.bincount(trace.sequence[trace.kind == PROMPT_ROW], minlength=trace.num_sequences)
    each = {"prompt_tokens": own, "loads": costs.loads[0], "tokens": costs.tokens}
    return {
        "kind": "reading",
        "model": model,
        "slots": slots,
        "policy": policy,
        "num_experts": trace.num_experts,
        "transfers_per_token": bootstrap(costs.loads[0], costs.tokens).to_dict(),
        "per_prompt": {name: values.tolist() for name, values in each.items()},
    }
