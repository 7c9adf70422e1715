"""Choose by use which experts a model can do without, and measure what their absence costs."""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from melinoe.cache.locality import popularity
from melinoe.checkpoint import check_output, load_tokenizer
from melinoe.checkpoint.pruning import prune
from melinoe.config import OutcomeSettings
from melinoe.data import Encoded, Example, encode
from melinoe.engine.load import load
from melinoe.errors import DataError, MelinoeError
from melinoe.evaluate import Perplexity, perplexity, perplexity_increase
from melinoe.measure import reading_trace
from melinoe.stats import Estimate
from melinoe.whole_file import unfinished


@dataclass(frozen=True)
class Pruned:
    """Experts of a layer before and after, and what perplexity grew by: 0.02 is 2 % worse."""

    before: int
    kept: int
    increase: Estimate


def prune_by_use(
    name: str,
    examples: Sequence[Example],
    out: str | Path,
    *,
    keep: int | None = None,
    max_increase: float | None = None,
    memory: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Pruned:
    """
    Drop the experts that *examples* use least, as many in each layer; write a plain checkpoint.

    The first half of the examples counts uses, the second half judges.

    Args:
        examples: At least two, of the traffic that the result is for.
        keep: Experts of each layer that stay.
        max_increase: In place of *keep*: the fewest with which perplexity grows by so much at most,
            found by halving; each number that is tried is written beside *out* and measured.
        memory: How models are loaded, as arguments of `melinoe.load`.
        say: Told what was tried.

    Raises:
        DataError: too few examples.
        MelinoeError: neither or both of *keep* and *max_increase*; or no smaller number; or as
            `melinoe.checkpoint.pruning.prune`.
    """
    if (keep is None) == (max_increase is None):
        raise MelinoeError("say how many experts to keep or what they may cost, one of the two")
    if len(examples) < 2:
        raise DataError("half of the examples count and half judge; give at least two")
    check_output(out)
    options = dict(memory or {})
    model, handle = load(name, **options)
    encoded = encode(examples, load_tokenizer(name, model.config), OutcomeSettings().max_length)
    counted, judged = encoded[: len(encoded) // 2], encoded[len(encoded) // 2 :]
    trace = reading_trace(model, handle, counted)
    whole = perplexity(model, judged)
    del model, handle  # one model in memory at a time
    gc.collect()
    if keep is not None and keep >= trace.num_experts:
        raise MelinoeError(
            f"{name} has {trace.num_experts} experts in each layer; keep fewer than that"
        )
    order = np.argsort(-popularity(trace), axis=1, kind="stable")

    def written(count: int, place: Path) -> Estimate:
        prune(name, order[:, :count].tolist(), place)
        found = perplexity_increase(_judge(place, judged, options), whole)
        say(f"{count} of {trace.num_experts} experts: perplexity {100 * found.mean:+.2f} %")
        return found

    if keep is not None:
        return Pruned(trace.num_experts, keep, written(keep, Path(out)))
    assert max_increase is not None
    least, enough = trace.top_k, trace.num_experts
    while least < enough:
        middle = (least + enough) // 2
        with unfinished(Path(out)) as work:
            does = written(middle, work / "tried").mean <= max_increase
        least, enough = (least, middle) if does else (middle + 1, enough)
    if enough == trace.num_experts:
        raise MelinoeError(
            f"without any expert of its {trace.num_experts} the model is more than "
            f"{100 * max_increase:g} % worse; allow more, or fine-tune it first"
        )
    return Pruned(trace.num_experts, enough, written(enough, Path(out)))


def _judge(place: Path, texts: Sequence[Encoded], options: Mapping[str, Any]) -> Perplexity:
    model, handle = load(str(place), **options)
    try:
        return perplexity(model, texts)
    finally:
        del model, handle
        gc.collect()
