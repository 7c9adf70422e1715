"""`melinoe evaluate`: perplexity and exact match, with intervals, of one model or two."""

from typing import Annotated, Any

import typer

from melinoe.cli import options


def command(
    model: options.Model,
    data: Annotated[str, typer.Option(help="Held-out examples: a JSONL file or hub data set.")],
    against: Annotated[
        str | None, typer.Option(help="Another model on the same data; differences are paired.")
    ] = None,
    answers: Annotated[
        bool, typer.Option(help="Also generate, and match the number after '####'.")
    ] = False,
    limit: options.Limit = None,
    split: Annotated[str, typer.Option(help="Split of a hub data set.")] = "test",
    max_length: Annotated[int, typer.Option(help="Longest sequence, in tokens.", min=2)] = 512,
    max_new_tokens: options.NewTokens = 256,
    batch_size: Annotated[int, typer.Option(help="Sequences per forward pass.", min=1)] = 8,
    slots: options.Slots = None,
    expert_memory: options.ExpertMemory = None,
    policy: options.Policy = "lru",
    store: options.StoreKind = "auto",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Measure perplexity on completions (and exact match), on an offloaded model."""
    from melinoe.data import encode, encode_prompt, load_examples
    from melinoe.evaluate import exact_match, perplexity, perplexity_increase
    from melinoe.generate import generate

    examples = load_examples(data, split=split, limit=limit)
    rows: list[dict[str, Any]] = []
    measured = []
    for name in [model, against] if against else [model]:
        assert name is not None
        loaded, handle, tokenizer = options.open_model(
            name, device, dtype, slots, expert_memory, policy, store
        )
        found = perplexity(loaded, encode(examples, tokenizer, max_length), batch_size)
        measured.append(found)
        rows.append(_row(name, "perplexity", found.estimate))
        if answers:
            written = []
            for example in examples:
                prompt = encode_prompt(example, tokenizer)
                result = generate(loaded, handle, tokenizer, prompt, max_new_tokens)
                written.append(result.text)
            references = [example.completion for example in examples]
            rows.append(_row(name, "exact match", exact_match(written, references)))
        handle.detach()
    if against:
        increase = perplexity_increase(measured[0], measured[1])
        rows.append(_row(f"{model} over {against}", "perplexity increase", increase))
    if as_json:
        options.show_json(rows)
    else:
        options.show_table(f"{len(examples)} examples of {data}", rows)


def _row(model: str, measure: str, value: Any) -> dict[str, Any]:
    return {"model": model, "measure": measure, **value.to_dict()}
