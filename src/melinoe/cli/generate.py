"""`melinoe generate`: write text with few experts resident."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from melinoe.cli import models, options, output, prefetching
from melinoe.cli.command import option, with_settings
from melinoe.engine.options import Options

_LONGEST_PROMPT_BYTES = 16 << 20  # far beyond any context; a stream may have no end


@with_settings(Options, options.SERVING)
def command(
    model: options.Model,
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.")],
    max_new_tokens: options.NewTokens = 64,
    temperature: Annotated[
        float, option("Sample at this temperature. 0: take the likeliest token.", min=0)
    ] = 0.0,
    seed: Annotated[int, option("Seed of the sampling.")] = 0,
    raw: options.Raw = False,
    as_json: options.AsJson = False,
    prefetch: Annotated[
        str | None,
        option(
            f"{prefetching.HELP} Default: the one that --predictor, --recent-use or --popularity "
            "is for, else none.",
            options.AHEAD,
        ),
    ] = None,
    predictor: prefetching.PredictorDir = None,
    popularity: prefetching.PopularityFile = None,
    prefetch_at: prefetching.Moment = None,
    recent_use: Annotated[
        Path | None,
        option(
            "Prefetch the experts used lately, and learn from this text too: a file, made if "
            "it is absent. Instead of --predictor.",
            options.AHEAD,
        ),
    ] = None,
    allocate_from: options.AllocateFrom = None,
    choice: options.Choice = "exact",
    choice_strength: options.ChoiceStrength = 0.1,
    choice_keep: options.ChoiceKeep = 1,
    *,
    given: dict[str, Any],
) -> None:
    """Write text with few experts resident: the text to stdout, its cost to stderr."""
    import torch

    from melinoe.cache.prefetch import prefetcher
    from melinoe.data import Example
    from melinoe.generate import generate
    from melinoe.predictor import Predictor, RecentUse

    names = prefetching.names_of(
        None if prefetch is None else [prefetch],
        prefetch_at,
        recent_use=recent_use,
        predictor=predictor,
        popularity=popularity,
    )
    if len(names) > 1:
        raise typer.BadParameter(f"name one of {', '.join(names)}", param_hint="--prefetch")
    if recent_use is not None and predictor is not None:
        raise typer.BadParameter("give it or --predictor, and not both", param_hint="--recent-use")
    guess = Predictor.load(predictor) if predictor else None
    # What is missing or wrong shows before the model is opened.
    made_of = prefetching.given(guess, popularity, prefetch_at)
    recent = None
    if recent_use is None:
        ahead = prefetcher(names[0], made_of)
    elif recent_use.exists():
        recent = RecentUse.load(recent_use)
    text = _read_prompt() if prompt == "-" else prompt
    wanted = models.choice_settings(choice, choice_strength, choice_keep)
    loaded, handle, tokenizer = models.open_model(model, given, allocate_from)
    handle.choose(wanted)
    asked: Any = text
    if tokenizer.chat_template and not raw:
        (asked,) = models.prompt_ids([Example(text, "", "the prompt")], tokenizer, raw)
    if recent_use is not None:
        recent = recent or RecentUse.of(loaded)
        ahead = prefetcher(names[0], replace(made_of, predictor=recent))
    torch.manual_seed(seed)
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature} if temperature else {}
    )
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
        **sampling,
    )
    if recent is not None and recent_use is not None:
        recent.update(recent_use)
    cost = _cost(handle, result, choice, names[0])
    if as_json:
        output.show_json({"prompt": text, "text": result.text, "ids": result.ids, **cost})
    else:
        output.say(_in_words(cost))


def _cost(handle: Any, result: Any, choice: str, prefetch: str) -> dict[str, Any]:
    """Give what a text cost: memory, hits and loads, and time."""
    counters, by_layer = result.counters, handle.slots_by_layer
    blocks = [handle.store.block_bytes(layer) for layer in range(len(handle.layers))]
    wasted = counters.prefetch_unused * blocks
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
        "prefetch_precision": counters.prefetch_precision(),
        "prefetch_recall": counters.prefetch_recall(),
        "prefetch_waste_bytes": int(wasted.sum()) if counters.prefetch_loads.any() else None,
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
