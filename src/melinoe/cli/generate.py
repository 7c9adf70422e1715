"""`melinoe generate`: prompt to text, with few experts resident."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from melinoe.cli import allocating, options, prefetching

_LONGEST_PROMPT_BYTES = 16 << 20  # far beyond any context; a stream may have no end


def command(
    model: options.Model,
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.")],
    max_new_tokens: options.NewTokens = 64,
    slots: options.Slots = None,
    expert_memory: options.ExpertMemory = None,
    allocate_from: allocating.AllocateFrom = None,
    policy: options.Policy = "lru",
    store: options.StoreKind = "auto",
    miss: options.Miss = "wait",
    miss_threads: options.MissThreads = None,
    prefetch: Annotated[
        str | None,
        typer.Option(
            help=f"What is loaded ahead of need: {prefetching.NAMES}. Default: what --predictor, "
            "--prior or --popularity is for, else none."
        ),
    ] = None,
    predictor: prefetching.PredictorDir = None,
    popularity: prefetching.PopularityFile = None,
    prefetch_at: prefetching.Moment = None,
    prior: Annotated[
        Path | None,
        typer.Option(
            help="Prefetch what was used lately, and learn from this completion: a file, made if "
            "it is absent. Instead of --predictor."
        ),
    ] = None,
    user: Annotated[
        str, typer.Option(help="With --prior: whose request this is; users are kept apart.")
    ] = "",
    choice: options.Choice = "exact",
    choice_strength: options.ChoiceStrength = 0.1,
    choice_keep: options.ChoiceKeep = 1,
    temperature: Annotated[
        float, typer.Option(help="Above 0: sample; 0: the likeliest token.", min=0.0)
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    engine: options.Engine = "reference",
    compression: options.Compression = None,
    compile: options.Compile = False,
    gpu_memory: options.GpuMemory = None,
    context: options.Context = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Generate text with few experts resident; the text to stdout, what it cost to stderr."""
    from dataclasses import replace

    import torch

    from melinoe.generate import generate
    from melinoe.predictor import AdaptivePredictor, Predictor, Prior, open_prior
    from melinoe.prefetch import prefetcher

    names = prefetching.names_of(
        None if prefetch is None else [prefetch],
        prefetch_at,
        prior=prior,
        predictor=predictor,
        popularity=popularity,
    )
    if len(names) > 1:
        raise typer.BadParameter(f"name one of {', '.join(names)}", param_hint="--prefetch")
    if prior is None and user:
        raise typer.BadParameter("it belongs to --prior", param_hint="--user")
    if prior is not None and predictor is not None:
        raise typer.BadParameter("give it or --predictor, and not both", param_hint="--prior")
    guess = Predictor.load(predictor) if predictor else None
    # What is missing or wrong shows before the model is opened; a prior is opened with it.
    made_of = prefetching.given(guess, popularity, prefetch_at)
    ahead = None if prior is not None else prefetcher(names[0], made_of)
    if prior is not None and prior.exists():
        Prior.load(prior)  # what is wrong with it shows before the model is opened
    text = _read_prompt() if prompt == "-" else prompt
    wanted = options.choice_of(choice, choice_strength, choice_keep)
    loaded, handle, tokenizer = options.open_model(
        model, device, dtype, slots, expert_memory, policy, store, engine,
        miss=miss, miss_threads=miss_threads, allocate_from=allocate_from,
        compression=compression, gpu_memory=gpu_memory, context=context,
        compile=compile or None,
    )  # fmt: skip
    handle.choose(wanted)
    kept = None
    if prior is not None:
        kept = open_prior(prior, loaded)
        ahead = prefetcher(names[0], replace(made_of, predictor=AdaptivePredictor(kept, user)))
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
        text,
        max_new_tokens=max_new_tokens,
        prefetch=ahead,
        streamer=streamer,
        **sampling,
    )
    if kept is not None and prior is not None:
        kept.update(prior)
    assert result.counters is not None  # there is a handle
    blocks = [handle.store.block_bytes(layer) for layer in range(len(handle.layers))]
    copied, wasted = result.counters.prefetch_loads.any(), result.counters.prefetch_unused * blocks
    by_layer = handle.slots_by_layer
    cost = {
        "slots": handle.slots,
        **({"slots_by_layer": list(by_layer)} if len(set(by_layer)) > 1 else {}),
        "expert_memory_bytes": handle.expert_memory_bytes,
        "choice": choice,
        "changed_choices": handle.changed_choices,
        "hit_rate": result.counters.hit_rate("completion"),
        "transfers_per_token": result.counters.transfers_per_token(),
        "computed_there_per_token": result.counters.on_host_per_token(),
        "prefetch": names[0],
        "prefetch_per_token": result.counters.prefetch_per_token(),
        "prefetch_precision": result.counters.prefetch_precision(),
        "prefetch_recall": result.counters.prefetch_recall(),
        "prefetch_waste_bytes": int(wasted.sum()) if copied else None,
        "adjusted_hit_rate": result.counters.adjusted_hit_rate("completion"),
        "ttft_s": result.ttft_s,
        "tokens_per_s": result.tokens_per_s,
    }
    if as_json:
        options.show_json({"prompt": text, "text": result.text, "ids": result.ids, **cost})
    else:
        options.say("  ".join(f"{name} {value}" for name, value in _short(cost).items()))


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


def _short(cost: dict) -> dict:
    return {name: round(v, 3) if isinstance(v, float) else v for name, v in cost.items()}
