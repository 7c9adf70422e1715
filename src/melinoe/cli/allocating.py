"""Slots given to layers by what a trace says each would load, for commands that run a model."""

from pathlib import Path
from typing import Annotated, Any

import typer

AllocateFrom = Annotated[
    Path | None,
    typer.Option(
        help="Give the slots to the layers by the miss curves of this trace of the model: as many "
        "in all as --slots or --expert-memory would give, where they save most."
    ),
]


def slots_from(
    trace_file: Path, path: str, slots: int | None, expert_memory: str | None, policy: str
) -> tuple[int, ...]:
    """
    Split a budget over layers.

    Args:
        trace_file: Of the same model; its fingerprint is compared once the model is loaded.
        path: Of the checkpoint; its config and headers are read.
        slots: Of each layer on average.
        expert_memory: Bytes for all, instead.
        policy: Whose misses are counted.

    Raises:
        TraceError: not a trace, or one of another shape.
        BudgetError: too little for what one token needs.
        BadParameter: layers of different experts, which no number of slots is a budget for.
    """
    from melinoe.cache.allocate import allocate, cost_of
    from melinoe.cache.curves import miss_curves
    from melinoe.cache.trace import Trace
    from melinoe.checkpoint import describe
    from melinoe.cli import options
    from melinoe.engine.budget import parse_bytes

    about, trace = describe(path), Trace.load(trace_file)
    if len(set(about.layers)) > 1:
        raise typer.BadParameter(
            "this model's layers have experts of different number or size, so slots cannot be "
            "moved between them; leave it out",
            param_hint="--allocate-from",
        )
    trace.check_model(trace.fingerprint, about.moe_layers, about.num_experts, about.top_k)
    if expert_memory is not None:
        budget = parse_bytes(expert_memory) // about.bytes_per_expert
    else:
        budget = (slots or 0) * about.moe_layers
    split = allocate(cost_of(miss_curves(trace, policy)), budget, at_least=trace.top_k)
    options.say(f"slots by layer: {', '.join(map(str, split))} ({sum(split)} in all)")
    return split


def check_fingerprint(trace_file: Path, model: Any) -> None:
    """
    Make sure that slots were split by a trace of this very model.

    Raises:
        TraceError: they were not.
    """
    from melinoe.cache.trace import Trace
    from melinoe.moe.routing import fingerprint

    trace = Trace.load(trace_file)
    trace.check_model(fingerprint(model), trace.num_layers, trace.num_experts)
