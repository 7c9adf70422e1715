"""`melinoe generate`: prompt to text, with few experts resident."""

from pathlib import Path
from typing import Annotated

import typer

from melinoe.cli import options


def command(
    model: options.Model,
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.")],
    max_new_tokens: options.NewTokens = 64,
    slots: options.Slots = None,
    expert_memory: options.ExpertMemory = None,
    policy: options.Policy = "lru",
    store: options.StoreKind = "auto",
    predictor: Annotated[
        Path | None, typer.Option(help="Prefetch the experts that this predictor names.")
    ] = None,
    prefetch_at: Annotated[
        str,
        typer.Option(
            help="When: prompt, before it is read; completion, after it, where a long prompt would "
            "evict what was prefetched."
        ),
    ] = "prompt",
    prior: Annotated[
        Path | None,
        typer.Option(
            help="Prefetch what was used lately, and learn from this completion: a file, made if "
            "it is absent. With --predictor, it corrects that; alone, it stands for itself."
        ),
    ] = None,
    user: Annotated[
        str, typer.Option(help="With --prior: whose request this is; users are kept apart.")
    ] = "",
    half_life: Annotated[
        float | None,
        typer.Option(help="Of a new --prior: requests after which a request counts half."),
    ] = None,
    learn: Annotated[
        bool, typer.Option(help="With --prior: let this completion change it.")
    ] = True,
    choice: options.Choice = "exact",
    choice_strength: options.ChoiceStrength = 0.1,
    choice_keep: options.ChoiceKeep = 1,
    temperature: Annotated[
        float, typer.Option(help="Above 0: sample; 0: the likeliest token.", min=0.0)
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    engine: options.Engine = "reference",
    compression: options.Compression = None,
    gpu_memory: options.GpuMemory = None,
    context: options.Context = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Generate text with few experts resident; the text to stdout, what it cost to stderr."""
    import sys
    from typing import get_args

    import torch

    from melinoe.generate import PrefetchAt, generate
    from melinoe.predictor import AdaptivePredictor, Predictor, Prior, open_prior

    if prefetch_at not in get_args(PrefetchAt):
        raise typer.BadParameter(
            f"{prefetch_at!r} is not one of {', '.join(get_args(PrefetchAt))}",
            param_hint="--prefetch-at",
        )
    if prior is None and (user or half_life is not None):
        raise typer.BadParameter("it belongs to --prior", param_hint="--user, --half-life")
    guess: Predictor | AdaptivePredictor | None = Predictor.load(predictor) if predictor else None
    if prior is not None and prior.exists():
        if half_life is not None:
            raise typer.BadParameter(
                f"{prior} exists and has one; leave it out, or name a new file",
                param_hint="--half-life",
            )
        Prior.load(prior)  # what is wrong with it shows before the model is opened
    text = sys.stdin.read() if prompt == "-" else prompt
    wanted = options.choice_of(choice, choice_strength, choice_keep)
    loaded, handle, tokenizer = options.open_model(
        model, device, dtype, slots, expert_memory, policy, store, engine,
        compression=compression, gpu_memory=gpu_memory, context=context,
    )  # fmt: skip
    handle.choose(wanted)
    kept = None
    if prior is not None:
        kept = open_prior(prior, loaded, half_life)
        assert guess is None or isinstance(guess, Predictor)
        guess = AdaptivePredictor(kept, guess, user, learns=learn)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {}
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
        predictor=guess,
        prefetch_at=prefetch_at,  # type: ignore[arg-type]
        streamer=streamer,
        **sampling,
    )
    if kept is not None and prior is not None and learn:
        kept.save(prior)
    assert result.counters is not None  # there is a handle
    cost = {
        "slots": handle.slots,
        "expert_memory_bytes": handle.expert_memory_bytes,
        "choice": choice,
        "changed_choices": handle.changed_choices,
        "hit_rate": result.counters.hit_rate("completion"),
        "transfers_per_token": result.counters.transfers_per_token(),
        "prefetch_per_token": result.counters.prefetch_per_token(),
        "ttft_s": result.ttft_s,
        "tokens_per_s": result.tokens_per_s,
    }
    if as_json:
        options.show_json({"prompt": text, "text": result.text, "ids": result.ids, **cost})
    else:
        options.say("  ".join(f"{name} {value}" for name, value in _short(cost).items()))


def _short(cost: dict) -> dict:
    return {name: round(v, 3) if isinstance(v, float) else v for name, v in cost.items()}
