"""`melinoe trace`: record which experts every token chose."""

from pathlib import Path
from typing import Annotated, Any

from melinoe.cli import models, options, output
from melinoe.cli.command import option

_MORE = "What is recorded"


@options.serving()
def command(
    model: options.Model,
    data: options.Prompts,
    out: Annotated[Path, option("The trace file to write (.safetensors).")],
    limit: options.Limit = 64,
    max_new_tokens: options.NewTokens = 64,
    raw: options.Raw = False,
    columns: options.Columns = None,
    split: options.Split = "test",
    keep_prompts: Annotated[
        bool, option("Write the prompts' token ids beside the trace, for `predictor fit`.", _MORE)
    ] = True,
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
    loaded, handle, tokenizer = models.open_model(model, given)
    prompts = models.prompt_ids(examples, tokenizer, raw)
    trace = trace_prompts(loaded, handle, tokenizer, prompts, max_new_tokens, progress=output.say)
    trace.save(out)
    if keep_prompts:
        from melinoe.predictor import save_prompts

        output.say(f"prompts -> {save_prompts(out, trace.fingerprint, prompts)}")
    output.say(f"{trace.num_sequences} prompts, {len(trace)} tokens -> {out}")
