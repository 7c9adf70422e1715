"""`melinoe generate`: write text with few experts resident."""

import sys
from typing import Annotated, Any

import typer

from melinoe.cli import models, options, output
from melinoe.cli.command import option

_LONGEST_PROMPT_BYTES = 16 << 20  # far beyond any context; a stream may have no end


@options.serving()
def command(
    model: options.Model,
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.")],
    max_new_tokens: options.NewTokens = 64,
    temperature: options.Temperature = 0.0,
    seed: Annotated[int, option("Seed of the sampling.", **options.SEEDS)] = 0,
    raw: options.Raw = False,
    as_json: options.AsJson = False,
    prefetch: options.Prefetch = None,
    predictor: options.PredictorDir = None,
    popularity: options.PopularityFile = None,
    *,
    given: dict[str, Any],
) -> None:
    """Write text with few experts resident: the text to stdout, its cost to stderr."""
    import torch

    from melinoe.data import Example
    from melinoe.generate import generate

    named = None if prefetch is None else [prefetch]
    # What is missing or wrong shows before the model is opened.
    found = models.prefetchers(named, predictor, popularity, several=False)
    ((name, ahead),) = found.items()
    text = _read_prompt() if prompt == "-" else prompt
    loaded, handle, tokenizer = models.open_model(model, given)
    asked: Any = text
    if tokenizer.chat_template and not raw:
        (asked,) = models.prompt_ids([Example(text, "", "the prompt")], tokenizer, raw)
    torch.manual_seed(seed)
    streamer = None
    if not as_json:
        from transformers import TextStreamer

        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    result = generate(
        loaded,
        handle,
        tokenizer,
        asked,
        max_new_tokens=max_new_tokens,
        prefetch=ahead,
        streamer=streamer,
        **models.sampling(temperature),
    )
    cost = _cost(handle, result, given["choice"], name)
    if as_json:
        output.show_json({"prompt": text, "text": result.text, "ids": result.ids, **cost})
    else:
        output.say(_in_words(cost))


def _cost(handle: Any, result: Any, choice: str, prefetch: str) -> dict[str, Any]:
    """Give what a text cost: memory, hits and loads, and time."""
    counters, by_layer = result.counters, handle.slots_by_layer
    return {
        "slots": handle.slots,
        **({"slots_by_layer": list(by_layer)} if len(set(by_layer)) > 1 else {}),
        "expert_memory_bytes": handle.expert_memory_bytes,
        "choice": choice,
        "changed_choices": handle.changed_choices,
        "hit_rate": counters.hit_rate("completion"),
        "transfers_per_token": counters.transfers_per_token(),
        "computed_there_per_token": counters.on_host_per_token(),
        "prefetch": prefetch,
        "prefetch_per_token": counters.prefetch_per_token(),
        "adjusted_hit_rate": counters.adjusted_hit_rate("completion"),
        "ttft_s": result.ttft_s,
        "tokens_per_s": result.tokens_per_s,
    }


def _in_words(cost: dict[str, Any]) -> str:
    """Say the cost in a line; --json has all of it."""
    parts = [
        f"{cost['tokens_per_s']:.3g} tokens/s, the first after {cost['ttft_s']:.2g} s",
        f"{cost['slots']} experts of each layer resident",
    ]
    if cost["hit_rate"] is not None:
        parts.append(f"hit rate {cost['hit_rate']:.1%}")
    for name, words in (
        ("transfers_per_token", "experts loaded for each token"),
        ("computed_there_per_token", "computed on the CPU for each token"),
        ("prefetch_per_token", f"loaded ahead for each token ({cost['prefetch']})"),
        ("changed_choices", "choices changed"),
    ):
        if cost[name] or name == "transfers_per_token":
            parts.append(f"{cost[name] or 0:.3g} {words}")
    return "; ".join(parts)


def _read_prompt() -> str:
    """
    Read the prompt from standard input, as UTF-8 whatever the locale is.

    Raises:
        DataError: it is closed, empty, no text, or longer than any prompt.
    """
    from melinoe.errors import DataError

    way_out = "write the prompt to it, or give it as an argument"
    if sys.stdin is None:
        raise DataError(f"standard input is closed; {way_out}")
    try:
        given = sys.stdin.buffer.read(_LONGEST_PROMPT_BYTES + 1)
    except OSError as error:
        raise DataError(f"standard input cannot be read ({error.strerror}); {way_out}") from None
    if len(given) > _LONGEST_PROMPT_BYTES:
        raise DataError(
            f"standard input holds more than {_LONGEST_PROMPT_BYTES >> 20} MiB, which is no "
            "prompt; write less to it"
        )
    try:
        text = given.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"standard input is not UTF-8 text (byte 0x{given[error.start]:02x} at place "
            f"{error.start}); convert it"
        ) from None
    if not text.strip():
        raise DataError(f"standard input is empty; {way_out}")
    return text
