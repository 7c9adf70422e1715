"""Options of prefetching, and the prefetchers that they name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from melinoe.cli.command import option
from melinoe.cli.options import AHEAD
from melinoe.config import PREFETCH_AT, PREFETCH_MOMENTS

if TYPE_CHECKING:
    from melinoe.cache.prefetch import Given

HELP = (
    "Load experts ahead of need: none; popularity: the most used; prefill: those the prompt used; "
    "predictor: those a fitted predictor names; next-router: those that the next layer's router "
    "names one layer early; or a prefetch of an installed package."
)
PredictorDir = Annotated[
    Path | None,
    option("Predictor for --prefetch predictor: what `melinoe predictor fit` wrote.", AHEAD),
]
PopularityFile = Annotated[
    Path | None,
    option(
        "Counts for --prefetch popularity: a trace, or imported statistics. Default: the "
        "predictor's.",
        AHEAD,
    ),
]
Moment = Annotated[
    str | None,
    option(
        "When popularity and predictor load: prompt: before it is read, though a long prompt "
        f"evicts them again; completion: after it. Default: {PREFETCH_AT}.",
        AHEAD,
    ),
]


def names_of(
    named: Sequence[str] | None, at: str | None, *, recent_use: Any = None, **material: Any
) -> tuple[str, ...]:
    """
    Name the prefetches that a command line asks for, each once.

    Args:
        named: Given for --prefetch. Absent: those that the material is for, or ``none``.
        at: Given for --prefetch-at.
        recent_use: Given for --recent-use; it works as `predictor`.
        material: Name of a prefetch to what was given for it; None where nothing was.

    Raises:
        BadParameter: an unknown name or moment, or material for a prefetch that is not named.
    """
    from melinoe.cache.prefetch import prefetcher_names

    if at is not None and at not in PREFETCH_MOMENTS:
        raise typer.BadParameter(
            f"{at!r} is not one of {', '.join(PREFETCH_MOMENTS)}", param_hint="--prefetch-at"
        )
    material_for = [name for name, value in material.items() if value is not None]
    if not named:
        if recent_use is not None and "predictor" not in material_for:
            material_for.insert(0, "predictor")
        return tuple(material_for) or ("none",)
    known = prefetcher_names()
    for name in named:
        if name not in known:
            raise typer.BadParameter(
                f"{name!r} is not one of {', '.join(known)}", param_hint="--prefetch"
            )
    if recent_use is not None and "predictor" not in named:
        raise typer.BadParameter(
            "it is for --prefetch predictor, which is not named", param_hint="--recent-use"
        )
    for name in material_for:
        # A predictor also knows what is popular.
        if name not in named and not (name == "predictor" and "popularity" in named):
            raise typer.BadParameter(
                f"it is for --prefetch {name}, which is not named", param_hint=f"--{name}"
            )
    return tuple(dict.fromkeys(named))


def given(predictor: Any, popularity: Any, at: str | None) -> Given:
    """
    Collect what prefetchers are made of.

    Args:
        predictor: A loaded one, or None.
        popularity: A file of counts, or the counts. None: the predictor's, if it has some.
        at: Given for --prefetch-at.

    Raises:
        MelinoeError: a file that cannot be used.
    """
    from melinoe.cache.prefetch import Given
    from melinoe.cache.statistics import load_counts

    counts = load_counts(popularity) if isinstance(popularity, Path) else popularity
    if counts is None:
        counts = getattr(predictor, "popularity", None)
    return Given(counts, predictor, at)
