"""Read what `melinoe simulate` is told: slots, policies, prefetches, and the machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from melinoe.cli import models, prefetching

if TYPE_CHECKING:
    import numpy as np

    from melinoe.cache.prefetch import Prefetcher
    from melinoe.cache.timing import Machine, Work
    from melinoe.cache.trace import Trace


def read_slots(text: str, trace: Trace) -> int | list[int]:
    """Read --slots: one number, or one for each layer."""
    from melinoe.errors import MelinoeError

    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is neither a number nor numbers with commas", param_hint="--slots"
        ) from None
    if len(numbers) == 1:
        return numbers[0]
    if len(numbers) != trace.num_layers:
        raise MelinoeError(
            f"slots are given for {len(numbers)} layers, and the trace has {trace.num_layers}; "
            "give one number for each, or one for all"
        )
    return numbers


def read_policy_options(given: list[str] | None, names: list[str]) -> dict[str, Any]:
    """Read --policy-option, and try the options on the policy named."""
    if not given:
        return {}
    if len(names) != 1:
        raise typer.BadParameter("name one --policy that it belongs to")
    found: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        try:
            found[key] = float(value) if "." in value or "e" in value else int(value)
        except ValueError:
            equals = ""
        if not equals:
            raise typer.BadParameter(f"{text!r} is not name=number", param_hint="--policy-option")
    from melinoe.cache.policy import policy_class

    try:
        policy_class(names[0])(**found)
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(f"{names[0]}: {error}", param_hint="--policy-option") from None
    return found


def read_popularity(path: Path | None, trace: Trace) -> np.ndarray:
    """Count the choices of each layer and expert, in the trace or in the file *path*."""
    from melinoe.cache.locality import popularity
    from melinoe.cache.statistics import load_statistics

    return popularity(trace) if path is None else load_statistics(path, trace)


def read_prefetches(
    named: list[str] | None,
    at: str | None,
    trace: Trace,
    path: Path,
    popular: np.ndarray,
    model: str | None,
    predictor: Path | None,
) -> tuple[list[Prefetcher | None], list[list[int]] | None]:
    """Make each --prefetch, None for none; and read the prompts, if one needs them."""
    from dataclasses import replace

    from melinoe.cache.prefetch import Listed, Timed, prefetcher, prefetcher_class

    files = [text for text in named or [] if text.endswith(".json")]
    known = [text for text in named or [] if text not in files]
    if files and not known:
        known = ["none"]
    names = prefetching.names_of(known, at, predictor=predictor)
    guess = None
    if predictor is not None:
        from melinoe.predictor import Predictor

        guess = Predictor.load(predictor)
    made_of = prefetching.given(guess, popular, at)
    found: list[Prefetcher | None] = []
    for text in named or names:
        if text in files:
            found.append(Listed(_from_file(Path(text), trace), at or "completion"))
            continue
        fits = text == "none" or issubclass(prefetcher_class(text), Timed) or len(names) == 1
        found.append(prefetcher(text, made_of if fits else replace(made_of, at=None)))
    return found, _bound_to(found, trace, path, model)


def _bound_to(
    prefetchers: Sequence[Prefetcher | None], trace: Trace, path: Path, model: str | None
) -> list[list[int]] | None:
    """
    Bind the prefetchers that read prompts to the traced model.

    Args:
        prefetchers: To bind, where they read prompts.
        trace: Its prompts lie beside it.
        path: Of the trace.
        model: As the user names it. Absent: as the trace says.

    Returns:
        The prompts; None if no prefetcher reads them.

    Raises:
        MelinoeError: no prompts, no such model, or another model's.
    """
    reading = [one for one in prefetchers if one is not None and one.uses_ids]
    if not reading:
        return None
    from melinoe.predictor import load_prompts

    prompts = load_prompts(path, trace)
    backbone, tokenizer = models.open_backbone(trace, path, model)
    for one in reading:
        one.bind(backbone, tokenizer)
    return prompts


def _from_file(path: Path, trace: Trace) -> dict[int, list[list[int]]]:
    import json

    from melinoe.cache.prefetch import prefetcher_names
    from melinoe.errors import DataError

    way_out = (
        f"write sequence -> {trace.num_layers} lists of ids below {trace.num_experts} as JSON, "
        f"or name one of {', '.join(prefetcher_names())}"
    )
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
        lists = {int(key): [[int(e) for e in layer] for layer in v] for key, v in found.items()}
    except OSError as error:
        raise DataError(
            f"the prefetch {path} cannot be read ({error.strerror}); {way_out}"
        ) from error
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"the prefetch {path} is no lists of ids; {way_out}") from error
    for sequence, layers in lists.items():
        ids = [e for layer in layers for e in layer]
        twice = any(len(set(layer)) < len(layer) for layer in layers)
        outside = ids and not (min(ids) >= 0 and max(ids) < trace.num_experts)
        if len(layers) != trace.num_layers or twice or outside:
            raise DataError(f"the prefetch {path} does not fit sequence {sequence}; {way_out}")
    return lists


def read_figures(
    trace: Trace,
    link: str | None,
    link_latency: str,
    copy_time: str,
    device_bandwidth: str | None,
    dram: str | None,
    pass_time: str | None,
    model: str | None,
    expert_size: str | None,
    backbone_size: str,
) -> tuple[Machine, Work] | None:
    """Read what the time model needs, or None where no link is given."""
    if link is None:
        return None
    from melinoe.cache.timing import Machine, Work
    from melinoe.engine.budget import parse_bytes
    from melinoe.errors import HardwareError
    from melinoe.plan.hardware import find_bandwidth, parse_seconds

    def of(text: str | None, part: str) -> float | None:
        return None if text is None else find_bandwidth(text, part).bytes_per_s

    if (model is None) == (expert_size is None):
        raise HardwareError(
            "time needs the size of an expert; give either --model or --expert-size"
        )
    if model is None:
        assert expert_size is not None
        backbone = 0 if backbone_size == "0B" else parse_bytes(backbone_size)
        work = Work(expert_bytes=parse_bytes(expert_size), backbone_bytes=backbone)
    else:
        from melinoe.plan.facts import model_facts
        from melinoe.plan.hit_rates import check_shape

        facts = model_facts(models.resolve(model))
        check_shape(trace, facts)
        work = Work(
            expert_bytes=facts.layers[0].block_bytes,
            backbone_bytes=facts.read_bytes,
            kv_bytes=facts.kv_bytes or 0,
        )
    bandwidth = of(link, "link")
    assert bandwidth is not None
    machine = Machine(
        link_bytes_per_s=bandwidth,
        link_latency_s=parse_seconds(link_latency),
        copy_s=parse_seconds(copy_time),
        device_bytes_per_s=of(device_bandwidth, "device memory"),
        dram_bytes_per_s=of(dram, "DRAM"),
        pass_s=None if pass_time is None else parse_seconds(pass_time),
    )
    return machine, work


def with_popularity(name: str, own: dict[str, Any], popular: np.ndarray) -> dict[str, Any]:
    """Give the options of a policy, with popularity for the one that goes by it."""
    return {**own, "popularity": popular} if name == "static" else own


def allocated(
    trace: Trace,
    policy: str,
    size: int | list[int],
    chosen: dict[str, Any],
    source: Path | None,
    cold: bool,
) -> tuple[int, ...]:
    """Share out as many slots as *size* has in all by the miss-ratio curves of a trace."""
    from melinoe.cache.allocate import allocate, cost_of
    from melinoe.cache.curves import miss_curves
    from melinoe.cache.residency import check_capacity
    from melinoe.cache.trace import Trace

    for count in size if isinstance(size, list) else [size]:
        check_capacity(trace.num_experts, count)
    fitted = trace if source is None else Trace.load(source)
    fitted.check_model(trace.fingerprint, trace.num_layers, trace.num_experts, trace.top_k)
    curves = miss_curves(fitted, policy, policy_options=chosen, reset_between_sequences=cold)
    return allocate(
        cost_of(curves), sum(size) if isinstance(size, list) else size * len(curves.exact_from)
    )
