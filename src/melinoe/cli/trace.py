"""`melinoe trace`: record which experts every token chose."""

from pathlib import Path
from typing import Annotated, Any

from melinoe.cli import models, options, output
from melinoe.cli.command import option, with_settings
from melinoe.engine.options import Options

_MORE = "What is recorded"


@with_settings(Options, options.SERVING)
def command(
    model: options.Model,
    data: options.Prompts,
    out: Annotated[Path, option("The trace file to write (.safetensors).")],
    limit: options.Limit = 64,
    max_new_tokens: options.NewTokens = 64,
    raw: options.Raw = False,
    columns: options.Columns = None,
    split: options.Split = "test",
    scores: Annotated[
        bool, option("Also record each choice's weight, for the policy score.", _MORE)
    ] = False,
    guesses: Annotated[
        bool,
        option(
            "Also record what each layer's router says one layer early, for the prefetch "
            "next-router.",
            _MORE,
        ),
    ] = False,
    keep_prompts: Annotated[
        bool, option("Write the prompts' token ids beside the trace, for `predictor fit`.", _MORE)
    ] = True,
    allocate_from: options.AllocateFrom = None,
    choice: options.Choice = "exact",
    choice_strength: options.ChoiceStrength = 0.1,
    choice_keep: options.ChoiceKeep = 1,
    *,
    given: dict[str, Any],
) -> None:
    """Generate from prompts, and record which experts every token chose."""
    from melinoe.data import load_examples
    from melinoe.errors import OutputExistsError
    from melinoe.generate import trace_prompts

    if out.exists():
        raise OutputExistsError(f"{out} exists; name another file, or remove it first")
    examples = load_examples(data, split=split, limit=limit, columns=columns, prompts=True)
    wanted = models.choice_settings(choice, choice_strength, choice_keep)
    loaded, handle, tokenizer = models.open_model(model, given, allocate_from)
    handle.choose(wanted)
    prompts = models.prompt_ids(examples, tokenizer, raw)
    trace = trace_prompts(
        loaded,
        handle,
        tokenizer,
        prompts,
        max_new_tokens,
        progress=output.say,
        scores=scores,
        guesses=guesses,
    )
    trace.save(out)
    if keep_prompts:
        from melinoe.predictor import save_prompts

        output.say(f"prompts -> {save_prompts(out, trace.fingerprint, prompts)}")
    output.say(f"{trace.num_sequences} prompts, {len(trace)} tokens -> {out}")
