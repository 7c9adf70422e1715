"""`melinoe prefetch`: what strategies of prefetch there are, and what one of them is made of."""

from pathlib import Path
from typing import Annotated

import typer

from melinoe.cli import options

app = typer.Typer(
    help="Strategies that load experts ahead of need.", no_args_is_help=True, rich_markup_mode=None
)


@app.command("list")
def list_command(as_json: options.AsJson = False) -> None:
    """Print every prefetch that can be named, with what it is made of and when it loads."""
    from melinoe.prefetch import NONE, prefetcher_class, prefetcher_names

    rows = []
    for name in prefetcher_names():
        about = "Nothing is loaded ahead."
        if name != NONE:
            cls = prefetcher_class(name)
            words = (cls.__doc__ or "").strip().split("\n\n")[0]
            about = " ".join(words.split())
            about = about or f"{cls.__module__}:{cls.__qualname__}, which does not say."
        rows.append({"prefetch": name, "what it loads": about})
    if as_json:
        options.show_json(rows)
    else:
        options.show_table("prefetches", rows)


@app.command("store")
def store_command(
    trace: Annotated[Path, typer.Argument(help="A trace file written by `melinoe trace`.")],
    out: Annotated[Path, typer.Option(help="The file to write (.safetensors).")],
    model: Annotated[
        str | None,
        typer.Option(help="The traced model; `tiny` ships. Default: as the trace says."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="The prompts that were traced. Default: those beside the trace."),
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a hub data set.")] = "test",
) -> None:
    """Store the prompts of a trace with what their completions used, for `--prefetch nearest`."""
    from melinoe.cache.trace import Trace
    from melinoe.cli.prefetching import open_backbone
    from melinoe.data import encode_prompt, load_examples
    from melinoe.errors import OutputExistsError
    from melinoe.predictor import load_prompts
    from melinoe.prefetch.store import PromptStore

    if out.exists():
        raise OutputExistsError(f"{out} exists; name another file, or remove it first")
    loaded = Trace.load(trace)
    prompts = load_prompts(trace, loaded) if data is None else None
    backbone, tokenizer = open_backbone(loaded, trace, model)
    if prompts is None:
        assert data is not None
        examples = load_examples(data, split=split, limit=loaded.num_sequences)
        prompts = [encode_prompt(example, tokenizer) for example in examples]
    store = PromptStore.build(loaded, prompts, backbone.get_input_embeddings().weight)
    store.save(out)
    options.say(f"{len(store)} prompts -> {out}")
