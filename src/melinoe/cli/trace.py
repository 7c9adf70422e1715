"""`melinoe trace` and `melinoe simulate`: what a model chose, and what a cache makes of it."""

from pathlib import Path
from typing import Annotated

import typer

from melinoe.cli import options


def command(
    model: options.Model,
    data: Annotated[str, typer.Option(help="Prompts: a JSONL file or hub data set.")],
    out: Annotated[Path, typer.Option(help="The trace file to write (.safetensors).")],
    max_new_tokens: options.NewTokens = 64,
    limit: options.Limit = 64,
    split: Annotated[str, typer.Option(help="Split of a hub data set.")] = "test",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    slots: options.Slots = None,
    expert_memory: options.ExpertMemory = None,
    policy: options.Policy = "lru",
    store: options.StoreKind = "auto",
    choice: options.Choice = "exact",
    choice_strength: options.ChoiceStrength = 0.1,
    choice_keep: options.ChoiceKeep = 1,
) -> None:
    """Generate from prompts, and record which experts every token chose."""
    from melinoe.data import encode_prompt, load_examples
    from melinoe.generate import trace_prompts

    if out.exists():
        from melinoe.errors import OutputExistsError

        raise OutputExistsError(f"{out} exists; name another file, or remove it first")
    examples = load_examples(data, split=split, limit=limit)
    loaded, handle, tokenizer = options.open_model(
        model, device, dtype, slots, expert_memory, policy, store
    )
    options.choose(handle, choice, choice_strength, choice_keep)
    prompts = [encode_prompt(example, tokenizer) for example in examples]
    trace = trace_prompts(loaded, handle, tokenizer, prompts, max_new_tokens, progress=options.say)
    trace.save(out)
    options.say(f"{trace.num_sequences} prompts, {len(trace)} tokens -> {out}")


def simulate_command(
    trace: Annotated[Path, typer.Argument(help="A trace file written by `melinoe trace`.")],
    slots: Annotated[
        list[int] | None, typer.Option(help="Slots in each layer; may be repeated.")
    ] = None,
    policy: Annotated[
        list[str] | None, typer.Option(help="lru, lfu, belady; may be repeated.")
    ] = None,
    cold: Annotated[bool, typer.Option(help="Start every sequence with an empty cache.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Replay a trace through caches of any size and policy, and count what would have moved."""
    from melinoe.cache.simulator import simulate
    from melinoe.cache.trace import Trace

    loaded = Trace.load(trace)
    sizes = slots or [max(1, loaded.num_experts // 4)]
    rows = []
    for name in policy or ["lru", "lfu", "belady"]:
        for size in sizes:
            counters = simulate(loaded, size, name, reset_between_sequences=cold).counters
            rows.append(
                {
                    "policy": name,
                    "slots": size,
                    "hit_rate": counters.hit_rate("completion"),
                    "zero_miss_tokens": counters.zero_miss_share(),
                    "transfers_per_token": counters.transfers_per_token(),
                    "prefill_transfers_per_token": counters.transfers_per_token("prompt"),
                }
            )
    if as_json:
        options.show_json(rows)
        return
    options.show_table(
        f"{loaded.num_sequences} sequences, {loaded.num_experts} experts, "
        f"top-{loaded.top_k}, {loaded.num_layers} layers",
        rows,
    )
