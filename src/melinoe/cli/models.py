"""Open what a command line names: a model with few resident experts, its backbone, its prompts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from melinoe.cli import output
from melinoe.config import MISSES


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


def check_misses(named: Sequence[str]) -> None:
    """
    Check the names given to --miss.

    Raises:
        BadParameter: an unknown name.
    """
    if unknown := [one for one in named if one not in MISSES]:
        raise typer.BadParameter(
            f"{unknown[0]!r} is not one of {', '.join(MISSES)}", param_hint="--miss"
        )


# `--chat-template plain`: the roles and what they say, a line each.
_PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def use_chat_template(tokenizer: Any, named: str | None) -> None:
    """
    Give *tokenizer* the chat template that --chat-template names; None leaves its own.

    Raises:
        TokenizerError: a file that cannot be read.
    """
    if named is None:
        return
    from melinoe.errors import TokenizerError

    try:
        tokenizer.chat_template = _PLAIN if named == "plain" else Path(named).read_text("utf-8")
    except (OSError, ValueError) as error:
        raise TokenizerError(
            f"--chat-template {named} cannot be read: {error}; name a Jinja file, or plain"
        ) from error


def choice_settings(kind: str, strength: float, keep: int) -> Any:
    """Give what --choice and its companions ask for."""
    from melinoe.moe.choice import ChoiceSettings

    return ChoiceSettings(kind, strength if kind != "exact" else 0.0, keep)


def open_model(
    model: str, serving: dict[str, Any], allocate_from: Path | None = None
) -> tuple[Any, Any, Any]:
    """
    Open a model with the experts resident that fit, and say what was chosen.

    Args:
        model: As the user names it.
        serving: Options of `melinoe.load` by name.
        allocate_from: A trace of the model, by which its slots are shared out over the layers.

    Returns:
        The model, its handle and its tokenizer.
    """
    check_misses([serving["miss"]])
    if allocate_from is not None and serving["gpu_memory"] is not None:
        raise typer.BadParameter(
            "slots are shared out of --slots or --expert-memory; leave --gpu-memory out",
            param_hint="--allocate-from",
        )
    import torch

    from melinoe.checkpoint import load_tokenizer
    from melinoe.engine.load import load

    dtype = serving["dtype"]
    wanted = getattr(torch, dtype, None)
    if dtype != "auto" and not (isinstance(wanted, torch.dtype) and wanted.is_floating_point):
        raise typer.BadParameter(
            f"{dtype!r} is not auto, float32 or bfloat16", param_hint="--dtype"
        )
    output.quiet()
    path = resolve(model)
    if allocate_from is not None:
        split = _slots_by_layer(path, allocate_from, serving)
        serving = {**serving, "slots": split, "expert_memory": None}
    loaded, handle = load(path, **serving)
    if allocate_from is not None:
        from melinoe.cache.trace import Trace
        from melinoe.moe.routing import fingerprint

        trace = Trace.load(allocate_from)
        trace.check_model(fingerprint(loaded), trace.num_layers, trace.num_experts)
    tokenizer = load_tokenizer(path, loaded.config)
    output.say(handle.placement)
    if serving["miss"] == "cpu":
        output.say("misses are computed on the CPU; only a prefetch fills the slots")
    return loaded, handle, tokenizer


def _slots_by_layer(path: str, source: Path, serving: dict[str, Any]) -> tuple[int, ...]:
    """
    Share out slots over layers by the miss-ratio curves of a trace of the same model.

    Raises:
        TraceError: not a trace, or one of another shape.
        BudgetError: too little for what one token needs.
        BadParameter: layers of different experts, between which no slot can be moved; an amount
            of memory for packed experts.
    """
    from melinoe.cache.allocate import allocate, cost_of
    from melinoe.cache.curves import miss_curves
    from melinoe.cache.trace import Trace
    from melinoe.checkpoint import describe
    from melinoe.engine.budget import parse_bytes

    about, trace = describe(path, serving["dtype"]), Trace.load(source)
    if serving["slots"] is None and serving["expert_memory"] is None:
        raise typer.BadParameter(
            "say how many slots to share out: --slots or --expert-memory",
            param_hint="--allocate-from",
        )
    if len(set(about.layers)) > 1:
        raise typer.BadParameter(
            "this model's layers have experts of different number or size, so slots cannot be "
            "moved between them; leave it out",
            param_hint="--allocate-from",
        )
    packed = serving["format"] is not None or about.format != "plain"
    if packed and serving["expert_memory"] is not None:
        raise typer.BadParameter(
            "what a slot of packed experts takes depends on the engine; give --slots",
            param_hint="--expert-memory",
        )
    trace.check_model(trace.fingerprint, about.moe_layers, about.num_experts, about.top_k)
    if serving["expert_memory"] is not None:
        budget = parse_bytes(serving["expert_memory"]) // about.bytes_per_expert
    else:
        budget = serving["slots"] * about.moe_layers
    cost = cost_of(miss_curves(trace, serving["policy"]))
    split = allocate(cost, budget, at_least=trace.top_k)
    output.say(f"slots by layer: {', '.join(map(str, split))} ({sum(split)} in all)")
    return split


def open_backbone(trace: Any, path: Path, model: str | None) -> tuple[Any, Any]:
    """
    Open the model of a trace without its experts, and its tokenizer.

    Args:
        trace: A loaded one.
        path: Of its file.
        model: As the user names it. Absent: as the trace says.

    Raises:
        TraceError: the trace is of another model, or does not say of which.
    """
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
