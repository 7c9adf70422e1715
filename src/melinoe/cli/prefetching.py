"""What is loaded ahead of need, from the words of the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from melinoe.cli import options
from melinoe.config import PREFETCH_AT, PREFETCH_MOMENTS

if TYPE_CHECKING:
    from melinoe.cache.trace import Trace
    from melinoe.prefetch import Given, Prefetcher

NAMES = (
    "none; popularity, the most used experts; prefill, those the prompt used; predictor; "
    "next-router, what the next layer's router says early; or one of an installed "
    "package"
)
PredictorDir = Annotated[
    Path | None, typer.Option(help="What `melinoe predictor fit` wrote: for --prefetch predictor.")
]
PopularityFile = Annotated[
    Path | None,
    typer.Option(
        help="A trace or imported statistics: for --prefetch popularity. Default: the predictor's."
    ),
]
Moment = Annotated[
    str | None,
    typer.Option(
        help="When popularity and predictor load: prompt, before it is read, where a long one "
        f"evicts them again; completion, after it. Default: {PREFETCH_AT}."
    ),
]


def names_of(
    named: Sequence[str] | None, at: str | None, *, prior: Any = None, **material: Any
) -> tuple[str, ...]:
    """
    The prefetches meant, each once.

    Args:
        named: As given; absent: what the material is for, or ``none``.
        at: As given.
        prior: What was given for --prior, None if nothing was; it takes part in `predictor`.
        material: Name of a prefetch to what was given for it, None if nothing was.

    Raises:
        BadParameter: an unknown name or moment, or material for a prefetch that is not named.
    """
    from melinoe.prefetch import prefetcher_names

    if at is not None and at not in PREFETCH_MOMENTS:
        raise typer.BadParameter(
            f"{at!r} is not one of {', '.join(PREFETCH_MOMENTS)}", param_hint="--prefetch-at"
        )
    there = [name for name, value in material.items() if value is not None]
    if not named:
        if prior is not None and "predictor" not in there:
            there.insert(0, "predictor")
        return tuple(there) or ("none",)
    known = prefetcher_names()
    for name in named:
        if name not in known:
            raise typer.BadParameter(
                f"{name!r} is not one of {', '.join(known)}", param_hint="--prefetch"
            )
    if prior is not None and "predictor" not in named:
        raise typer.BadParameter(
            "it is for --prefetch predictor, which is not named", param_hint="--prior"
        )
    for name in there:
        # A predictor also knows what is popular.
        if name not in named and not (name == "predictor" and "popularity" in named):
            raise typer.BadParameter(
                f"it is for --prefetch {name}, which is not named", param_hint=f"--{name}"
            )
    return tuple(dict.fromkeys(named))


def given(predictor: Any, popularity: Any, at: str | None) -> Given:
    """
    What prefetchers are made of.

    Args:
        predictor: A loaded one, or None.
        popularity: A file of counts, or the counts; None: the predictor's, if it has some.
        at: As given.

    Raises:
        MelinoeError: a file that cannot be used.
    """
    from melinoe.cache.statistics import load_counts
    from melinoe.prefetch import Given

    counts = load_counts(popularity) if isinstance(popularity, Path) else popularity
    if counts is None:
        counts = getattr(predictor, "popularity", None)
    return Given(counts, predictor, at)


def bound_to(
    prefetchers: Sequence[Prefetcher | None], trace: Trace, path: Path, model: str | None
) -> list[list[int]] | None:
    """
    The prompts of a trace, and prefetchers that read them bound to its model; None if none does.

    Args:
        prefetchers: Bound.
        trace: Whose prompts lie beside it.
        path: Of the trace.
        model: Named by the user; absent: as the trace says.

    Raises:
        MelinoeError: no prompts, no such model, or another model's.
    """
    reading = [one for one in prefetchers if one is not None and one.uses_ids]
    if not reading:
        return None
    from melinoe.predictor import load_prompts

    prompts = load_prompts(path, trace)
    backbone, tokenizer = open_backbone(trace, path, model)
    for one in reading:
        one.bind(backbone, tokenizer)
    return prompts


def open_backbone(trace: Trace, path: Path, model: str | None) -> tuple[Any, Any]:
    """
    The model of a trace without its experts, and its tokenizer.

    Raises:
        TraceError: the trace is of another model, or does not say of which.
    """
    from melinoe.checkpoint import load_backbone, load_tokenizer, open_checkpoint
    from melinoe.errors import TraceError
    from melinoe.moe.routing import fingerprint

    name = model or trace.model
    if not name:
        raise TraceError(f"{path} does not say which model it is of; name it with --model")
    options.quiet()
    with open_checkpoint(options.resolve(name)) as checkpoint:
        backbone = load_backbone(checkpoint)
        tokenizer = load_tokenizer(options.resolve(name), backbone.config)
    if (found := fingerprint(backbone)) != trace.fingerprint:
        raise TraceError(
            f"{path} is of another model ({trace.fingerprint[:12]}) than {name} ({found[:12]}); "
            "name the model that was traced, or trace this one"
        )
    return backbone, tokenizer
