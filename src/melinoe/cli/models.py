"""Open what a command line names: a model with few resident experts, its backbone, its prompts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from melinoe.cli import output
from melinoe.cli.command import one_of
from melinoe.config import MISSES

# `--chat-template plain`: the roles and what they say, a line each.
_PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def resolve(model: str) -> str:
    """Give the path of the shipped model for `tiny`; any other name as it is."""
    if model == "tiny":
        from melinoe.shipped import TINY_OLMOE

        return str(TINY_OLMOE)
    return model


def resolve_device(device: str | None) -> str:
    """Give CUDA where no device is named and there is a GPU, else the CPU."""
    if device is not None:
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def is_given(context: typer.Context, name: str) -> bool:
    """Tell whether an option stands on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def described(path: str) -> Any:
    """Describe a checkpoint; UnsupportedModelError for one that cannot be served."""
    from melinoe.checkpoint import describe
    from melinoe.errors import UnsupportedModelError

    about = describe(path)
    if not about.supported:
        raise UnsupportedModelError(about.reason or "")
    return about


def check_slots(slots: int, experts: int) -> None:
    """Refuse more slots than a layer has experts."""
    if slots > experts:
        from melinoe.errors import BudgetError

        raise BudgetError(
            f"{slots} slots cannot be in layers of {experts} experts; choose from 1 to {experts}"
        )


def share_budget(given: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Let the budget of a GPU count the keys and values of all requests beside the experts."""
    said = given.get("slots") is not None or given.get("expert_memory") is not None
    if said or not resolve_device(given.get("device")).startswith("cuda"):
        return given
    return {**given, "batch": 1, "context": tokens}


def choice_settings(given: dict[str, Any]) -> Any:
    """Give what --choice and its companions ask for."""
    from melinoe.moe.choice import ChoiceSettings

    kind = given["choice"]
    strength = given["choice_strength"] if kind != "exact" else 0.0
    return ChoiceSettings(kind, strength, given["choice_keep"])


def open_model(
    model: str, given: dict[str, Any], *, choose: bool = True, chat_template: str | None = None
) -> tuple[Any, Any, Any]:
    """
    Open a model with the experts resident that fit, and say what was chosen.

    *given* are values of `melinoe.cli.options.Serving`. Gives model, handle and tokenizer.
    """
    one_of(given["miss"], MISSES, "--miss")
    import torch

    from melinoe.cache.trace import Trace
    from melinoe.checkpoint import load_tokenizer
    from melinoe.engine.load import load
    from melinoe.moe.routing import fingerprint

    dtype = getattr(torch, given["dtype"], None)
    if given["dtype"] != "auto" and not (
        isinstance(dtype, torch.dtype) and dtype.is_floating_point
    ):
        raise typer.BadParameter(
            f"{given['dtype']!r} is not auto, float32 or bfloat16", param_hint="--dtype"
        )
    output.quiet()
    template, choice, path = _chat_template(chat_template), choice_settings(given), resolve(model)
    ours = ("allocate_from", "choice", "choice_strength", "choice_keep")
    options = {name: value for name, value in given.items() if name not in ours}
    trace = None if given["allocate_from"] is None else Trace.load(given["allocate_from"])
    if trace is not None:
        options["slots"] = _slots_by_layer(path, trace, options)
    loaded, handle = load(path, **options)
    if trace is not None:
        trace.check_model(fingerprint(loaded), trace.num_layers, trace.num_experts)
    tokenizer = load_tokenizer(path, loaded.config)
    if template is not None:
        tokenizer.chat_template = template
    output.say(handle.placement)
    if given["miss"] == "cpu":
        output.say("misses are computed on the CPU; only a prefetch fills the slots")
    if choose:
        handle.choose(choice)
    return loaded, handle, tokenizer


def _chat_template(named: str | None) -> str | None:
    from melinoe.errors import TokenizerError

    try:
        if named in (None, "plain"):
            return None if named is None else _PLAIN
        return Path(str(named)).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise TokenizerError(
            f"--chat-template {named} cannot be read: {error}; name a Jinja file, or plain"
        ) from error


def _slots_by_layer(path: str, trace: Any, options: dict[str, Any]) -> tuple[int, ...]:
    """Share out slots over layers by the miss-ratio curves of a trace of the same model."""
    from melinoe.cache.counters import COMPLETION
    from melinoe.cache.curves import allocate, miss_curves
    from melinoe.checkpoint import describe

    about, hint = describe(path, options["dtype"]), "--allocate-from"
    if options["slots"] is None:
        wrong = "say how many slots to share out: give --slots, and no amount of memory"
        raise typer.BadParameter(wrong, param_hint=hint)
    if len(set(about.layers)) > 1:
        wrong = "this model's layers have experts of different number or size, so slots cannot be "
        raise typer.BadParameter(f"{wrong}moved between them; leave it out", param_hint=hint)
    trace.check_model(trace.fingerprint, about.moe_layers, about.num_experts, about.top_k)
    cost = miss_curves(trace, options["policy"])[COMPLETION]
    split = allocate(cost, options["slots"] * about.moe_layers, at_least=trace.top_k)
    output.say(f"slots by layer: {', '.join(map(str, split))} ({sum(split)} in all)")
    return split


def open_backbone(trace: Any, path: Path, model: str | None) -> tuple[Any, Any]:
    """Open a trace's model (*model*, else as it says) without experts; refuse another model."""
    from melinoe.checkpoint import load_backbone, load_tokenizer, open_checkpoint
    from melinoe.errors import TraceError
    from melinoe.moe.routing import fingerprint

    name = model or trace.model
    if not name:
        raise TraceError(f"{path} does not say which model it is of; name it with --model")
    output.quiet()
    with open_checkpoint(resolve(name)) as checkpoint:
        backbone = load_backbone(checkpoint)
        tokenizer = load_tokenizer(resolve(name), backbone.config)
    if (found := fingerprint(backbone)) != trace.fingerprint:
        raise TraceError(
            f"{path} is of another model ({trace.fingerprint[:12]}) than {name} ({found[:12]}); "
            "name the model that was traced, or trace this one"
        )
    return backbone, tokenizer


def prompt_ids(examples: Sequence[Any], tokenizer: Any, raw: bool) -> list[list[int]]:
    """Give the token ids of prompts, through the tokenizer's chat template unless *raw*."""
    from melinoe.data import encode_prompts

    chat = not raw and bool(tokenizer.chat_template)
    if chat and any(one.messages is None for one in examples):
        output.say("prompts go through the tokenizer's chat template; --raw leaves it out")
    return encode_prompts(examples, tokenizer, chat=chat)


def prefetchers(
    named: Sequence[str] | None,
    predictor: Path | None,
    popularity: Any = None,
    *,
    several: bool = True,
) -> dict[str, Any]:
    """
    Make the prefetches that a command line asks for: name to prefetcher, None for ``none``.

    *named* stands for --prefetch, absent: those that predictor and popularity are for;
    *popularity* is a trace given for --popularity, or counts, which ask for nothing, absent: the
    predictor's; with *several* more than one may be asked for.
    """
    from melinoe.cache import prefetch

    material = {"predictor": predictor, "popularity": popularity}
    implied = [name for name, one in material.items() if isinstance(one, Path)]
    names = list(dict.fromkeys(named or implied or [prefetch.NONE]))
    for name in names:
        one_of(name, prefetch.prefetcher_names(), "--prefetch")
    for name in implied:
        # A predictor also knows what is popular.
        if name not in names and not (name == "predictor" and "popularity" in names):
            raise typer.BadParameter(
                f"it is for --prefetch {name}, which is not named", param_hint=f"--{name}"
            )
    if len(names) > 1 and not several:
        raise typer.BadParameter(f"name one of {', '.join(names)}", param_hint="--prefetch")
    guess = None
    if predictor is not None:
        from melinoe.predictor import Predictor

        guess = Predictor.load(predictor)
    if isinstance(popularity, Path):
        popularity = count_choices(popularity)
    elif popularity is None:
        popularity = getattr(guess, "popularity", None)
    given = prefetch.Given(popularity, guess)
    return {name: prefetch.prefetcher(name, given) for name in names}


def count_choices(path: Path, like: Any = None) -> Any:
    """Count how often the trace at *path* chose each expert; refuse another shape than *like*'s."""
    from melinoe.cache.locality import popularity
    from melinoe.cache.trace import Trace

    trace = Trace.load(path)
    if like is not None:
        trace.check_model(trace.fingerprint, like.num_layers, like.num_experts)
    return popularity(trace)


def adapters(model: Any, handle: Any, named: Sequence[str]) -> Any:
    """Read the adapters of --adapter NAME=DIR; None without any."""
    if not named:
        return None
    from melinoe.adapters import Adapters

    made = Adapters(model, handle)
    for one in named:
        name, _, directory = one.partition("=")
        if not name or not directory:
            raise typer.BadParameter(f"{one!r} is not NAME=DIR", param_hint="--adapter")
        made.add(name, directory)
    return made
