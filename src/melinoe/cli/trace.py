"""`melinoe trace`: which experts a model chose, token by token."""

from pathlib import Path
from typing import Annotated

import typer

from melinoe.cli import allocating, options


def command(
    model: options.Model,
    data: Annotated[
        str, typer.Option("--data", "--prompts", help="Prompts: a file or hub data set.")
    ],
    out: Annotated[Path, typer.Option(help="The trace file to write (.safetensors).")],
    max_new_tokens: options.NewTokens = 64,
    columns: options.Columns = None,
    limit: options.Limit = 64,
    split: Annotated[str, typer.Option(help="Split of a hub data set.")] = "test",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    slots: options.Slots = None,
    expert_memory: options.ExpertMemory = None,
    allocate_from: allocating.AllocateFrom = None,
    policy: options.Policy = "lru",
    store: options.StoreKind = "auto",
    miss: options.Miss = "wait",
    miss_threads: options.MissThreads = None,
    choice: options.Choice = "exact",
    choice_strength: options.ChoiceStrength = 0.1,
    choice_keep: options.ChoiceKeep = 1,
    scores: Annotated[
        bool, typer.Option(help="Also record each choice's weight, for the policy score.")
    ] = False,
    guesses: Annotated[
        bool,
        typer.Option(
            help="Also record what each layer's router says one layer early, for the prefetch "
            "next-router."
        ),
    ] = False,
    keep_prompts: Annotated[
        bool,
        typer.Option(help="Write the prompts' token ids beside the trace, for `predictor fit`."),
    ] = True,
) -> None:
    """Generate from prompts, and record which experts every token chose."""
    from melinoe.data import encode_prompts, load_examples
    from melinoe.generate import trace_prompts

    if out.exists():
        from melinoe.errors import OutputExistsError

        raise OutputExistsError(f"{out} exists; name another file, or remove it first")
    examples = load_examples(data, split=split, limit=limit, columns=columns, prompts=True)
    wanted = options.choice_of(choice, choice_strength, choice_keep)
    loaded, handle, tokenizer = options.open_model(
        model, device, dtype, slots, expert_memory, policy, store,
        miss=miss, miss_threads=miss_threads, allocate_from=allocate_from,
    )  # fmt: skip
    handle.choose(wanted)
    prompts = encode_prompts(examples, tokenizer)
    trace = trace_prompts(
        loaded,
        handle,
        tokenizer,
        prompts,
        max_new_tokens,
        progress=options.say,
        scores=scores,
        guesses=guesses,
    )
    trace.save(out)
    if keep_prompts:
        from melinoe.predictor import save_prompts

        options.say(f"prompts -> {save_prompts(out, trace.fingerprint, prompts)}")
    options.say(f"{trace.num_sequences} prompts, {len(trace)} tokens -> {out}")
