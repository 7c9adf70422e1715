"""
Run strategies for real, in turn, and set what the simulator predicted beside what was measured.

    1. open the model once for each cache; experts in host memory are held once, for all
    2. trace the prompts with every expert resident: choices do not depend on slots
    3. simulate every strategy on that trace
    4. serve all strategies side by side, prompt by prompt, in one process
    5. compare: counts, which must be equal; seconds, whose error is stated
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from melinoe.cache.counters import COMPLETION, PROMPT
from melinoe.cache.policy import policy_class
from melinoe.cache.prefetch import NONE, Prefetcher
from melinoe.cache.simulator import Simulation, simulate
from melinoe.cache.timing import Machine, Work, predict
from melinoe.checkpoint import load_tokenizer, open_checkpoint
from melinoe.engine.handle import Handle
from melinoe.engine.load import load
from melinoe.engine.misses import activation_bytes, link_figures, mean_block_bytes, time_read
from melinoe.engine.transfer import EmulatedLink
from melinoe.errors import AttachError, BudgetError, MelinoeError
from melinoe.generate import prompt_ids, trace_prompts
from melinoe.host_memory import check_host_room, format_bytes
from melinoe.measure import machine, serving, side_by_side, timeline_record
from melinoe.stats import bootstrap

ON_DEMAND, ON_THE_CPU, ALL_RESIDENT = "on demand", "all misses by the CPU", "all resident"
_MISSES = {"wait": "", "cpu": ", misses by the CPU", "split": ", misses split"}


@dataclass(frozen=True)
class Strategy:
    """One way to serve."""

    name: str  # for tables
    slots: int  # experts of each layer
    policy: str  # which leaves
    prefetch: str = NONE  # name of what is loaded ahead of need
    warm: bool = False  # whether the cache keeps what the prompt before left
    miss: str = "wait"  # what is done about a miss: ``wait``, ``cpu``, ``split``
    engine: str = "reference"  # ``reference`` or ``fast``

    @property
    def cache(self) -> Strategy:
        """Strategies alike in all but prefetch share one."""
        return replace(self, name="", prefetch=NONE)


def strategies(
    num_experts: int,
    slots: Sequence[int],
    policies: Sequence[str],
    prefetches: Sequence[str] = (NONE,),
    misses: Sequence[str] = ("wait",),
    engines: Sequence[str] = ("reference",),
) -> list[Strategy]:
    """
    List all combinations, between loading every expert that is asked for and holding all of them.

    If the CPU computes all misses and nothing is loaded ahead, slots stay empty, so that is one
    strategy whatever the slots and the policy. The device engine waits for misses, always.

    Raises:
        BudgetError: a number of slots that the model cannot have.
        MelinoeError: an unknown policy, or one that needs the future; or the device engine alone is
            to compute misses on the CPU.
    """
    for count in slots:
        if not 1 <= count <= num_experts:
            raise BudgetError(
                f"{count} slots cannot be in layers of {num_experts} experts; "
                f"choose from 1 to {num_experts}"
            )
    for name in policies:
        if policy_class(name).offline:
            raise MelinoeError(
                f"policy {name!r} needs the future, which nobody has while serving; "
                "use `melinoe simulate` for it"
            )
    if "reference" not in engines and set(misses) != {"wait"}:
        raise MelinoeError(
            "the device engine waits for missing experts and has the CPU compute none; leave "
            "--miss out, or add --engine reference"
        )
    out = []
    for engine in engines:
        reference = engine == "reference"
        suffix = "" if reference else f", {engine} engine"
        if reference:
            out.append(Strategy(ON_DEMAND, 1, "lru"))
        for miss in dict.fromkeys(misses) if reference else ("wait",):
            for count in dict.fromkeys(slots):
                for policy in dict.fromkeys(policies):
                    for ahead in prefetches:
                        if (miss, ahead) != ("cpu", NONE):
                            name = policy if ahead == NONE else f"{policy} + {ahead} prefetch"
                            name += _MISSES[miss] + suffix
                            out.append(
                                Strategy(name, count, policy, ahead, miss=miss, engine=engine)
                            )
            if miss == "cpu" and NONE in prefetches:
                out.append(Strategy(ON_THE_CPU, slots[0], policies[0], miss=miss))
        out.append(Strategy(ALL_RESIDENT + suffix, num_experts, "lru", warm=True, engine=engine))
    return out


def check_fast(device: str, emulated: bool) -> None:
    """Refuse the device engine where it cannot run, before anything is read."""
    reason: str | None = "Triton is not installed"
    if find_spec("triton") is not None:
        from melinoe.engine.device.support import why_not

        reason = why_not(torch.device(device))
    if reason is None and emulated:
        reason = "it has no emulated link"
    if reason is not None:
        raise AttachError(f"the device engine cannot run here: {reason}; give --engine reference")


def bench(
    path: str,
    chosen: Sequence[Strategy],
    prompts: Sequence[Any],
    prefetchers: Mapping[str, Prefetcher | None],
    *,
    label: str,
    device: str = "cpu",
    dtype: str = "auto",
    store: str = "auto",
    link: tuple[float, float] | None = None,
    max_new_tokens: int = 64,
    repeat: int = 1,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
    """
    Serve *prompts* by every strategy, and compare with the simulator.

    Args:
        path: The model; *label* is its name in tables.
        chosen: From `strategies`; for each engine one of them holds every expert.
        prompts: Texts or token ids.
        prefetchers: By the names that strategies have.
        device, dtype, store: As `melinoe.load`.
        link: Bandwidth in bytes a second and latency of an emulated link.
        repeat: Runs of each prompt.

    Returns:
        The records of kind ``serve``, in the order of *chosen*, each with ``predicted``; one of
        kind ``timeline``; and a benchmark record with a row for each strategy.
    """
    tokenizer, opened = _open(path, chosen, device, dtype, store, link)
    resident = {one.engine: one for one in chosen if one.warm}
    model, handle = opened[next(iter(resident.values())).cache]
    say(f"tracing {len(prompts)} prompts with every expert resident")
    guesses = any(one is not None and one.uses_guesses for one in prefetchers.values())
    trace = trace_prompts(model, handle, tokenizer, prompts, max_new_tokens, guesses=guesses)
    ids = [prompt_ids(tokenizer, one) for one in prompts]
    read_s = time_read(handle.layers, handle.store, torch.device(model.device))
    servings, replays = [], []
    for one in chosen:
        model, handle = opened[one.cache]
        ahead = prefetchers.get(one.prefetch)
        if ahead is not None:
            ahead.bind(model, tokenizer)
        replays.append(
            simulate(
                trace,
                one.slots,
                one.policy,
                prefetch=ahead,
                prompts=ids,
                reset_between_sequences=not one.warm,
                load=handle.misses.rule,
                prefill=getattr(handle, "prefill", None),
                steps=True,
                engine="residency",
            )
        )
        servings.append(
            serving(
                model,
                handle,
                tokenizer,
                prompts,
                max_new_tokens,
                prefetch=ahead,
                label=label,
                strategy=one.name,
                cold=not one.warm,
                repeat=1 if one.warm else repeat,
            )
        )
    say(f"serving {len(prompts)} prompts by {len(chosen)} strategies in turn")
    records = side_by_side(servings)
    rows = []
    for one, record, done in zip(chosen, records, replays, strict=True):
        _, handle = opened[one.cache]
        measured = records[list(chosen).index(resident[one.engine])]["per_prompt"]
        work = Work(
            expert_bytes=mean_block_bytes(handle.store),
            activation_bytes=activation_bytes(handle.layers[0]),
        )
        seconds = seconds_of(done, machine_of(handle, read_s, measured), work)
        record["engine"] = one.engine
        record["predicted"] = _predicted(record, counts_of(done), *seconds)
        rows.append(_row(one, record))
    say("serving one prompt token by token")
    extremes = (ON_DEMAND, ON_THE_CPU, ALL_RESIDENT)
    first = next((one for one in chosen if not one.name.startswith(extremes)), chosen[0])
    moments = timeline_record(
        *opened[first.cache], tokenizer, prompts[0], max_new_tokens,
        label=f"{label}, {first.name}", prefetch=prefetchers.get(first.prefetch),
    )  # fmt: skip
    table = _benchmark(rows, label, len(prompts), max_new_tokens, link, read_s)
    return records, moments, table


def _open(
    path: str,
    chosen: Sequence[Strategy],
    device: str,
    dtype: str,
    store: str,
    link: tuple[float, float] | None,
) -> tuple[Any, dict[Strategy, tuple[Any, Handle]]]:
    """Load the model once for each cache, the largest first; the tokenizer beside them."""
    caches = sorted(dict.fromkeys(one.cache for one in chosen), key=lambda one: -one.slots)
    with open_checkpoint(path, dtype) as checkpoint:
        held = 0 if store in ("auto", "disk") else checkpoint.expert_bytes
        held += len(caches) * checkpoint.backbone_bytes
        held += sum(
            min(one.slots, layer.num_experts) * layer.block_bytes
            for one in caches
            for layer in checkpoint.layers
        )
        config = checkpoint.config
    if device == "cpu":
        what = f"{len(caches)} caches side by side, {format_bytes(held)} of them,"
        check_host_room(held, what, "try fewer --slots or --policy at once")
    opened: dict[Strategy, tuple[Any, Handle]] = {}
    shared: dict[str, Any] = {}  # by engine, the store of its first cache
    measured: dict[str, Any] = {}
    for one in caches:
        reference = one.engine == "reference"
        model, handle = load(
            path,
            device,
            engine=one.engine,
            slots=one.slots,
            policy=one.policy,
            store=shared.get(one.engine, store if reference else "auto"),
            dtype=dtype,
            # A link of its own: strategies do not queue behind one another.
            link=EmulatedLink(*link) if reference and link is not None else None,
            miss=measured.get(one.miss, one.miss) if reference else "wait",
        )
        if handle.store.kind != "disk":
            shared[one.engine] = handle.store
        if handle.misses.machine is not None:  # measured once, for all
            measured |= {way: replace(handle.misses, kind=way) for way in ("cpu", "split")}
        opened[one] = (model, handle)
    return load_tokenizer(path, config), opened


def counts_of(done: Simulation) -> dict[str, list[int]]:
    """The simulated counts by prompt, named as a measured record's ``per_prompt``."""
    every = done.per_sequence
    columns = {
        "tokens": [one.tokens[COMPLETION] for one in every],
        "uses": [one.uses[COMPLETION].sum() for one in every],
        "hits": [one.hits[COMPLETION].sum() for one in every],
        "loads": [one.loads[COMPLETION].sum() for one in every],
        "prefetch_loads": [one.prefetch_loads.sum() for one in every],
        "prefetch_used": [one.prefetch_used.sum() for one in every],
        "prefill_loads": [one.loads[PROMPT].sum() for one in every],
        "elsewhere": [one.on_host[COMPLETION].sum() for one in every],
        "prefill_elsewhere": [one.on_host[PROMPT].sum() for one in every],
        "zero_miss": [one.zero_miss_tokens[COMPLETION] for one in every],
    }
    return {name: [int(value) for value in column] for name, column in columns.items()}


def seconds_of(done: Simulation, machine: Machine, work: Work) -> tuple[np.ndarray, np.ndarray]:
    """Predict the seconds of each prompt: of its own pass, and of the passes after it."""
    timing = predict(done, machine, work)
    steps = timing.steps
    out = np.zeros((2, len(done.sequences)))
    for phase in (PROMPT, COMPLETION):
        chosen = steps.phase == phase
        np.add.at(out[phase], steps.unit[chosen], timing.pass_s[chosen])
    return out[PROMPT], out[COMPLETION]


def machine_of(handle: Handle, read_s: float, resident: Mapping[str, Any]) -> Machine:
    """
    Collect the figures that predictions rest on, none of them from the strategies themselves.

    *read_s* is what reading one expert takes alone, *resident* the ``per_prompt`` of the record
    with every expert resident: computing is what it took less what it waited.
    """
    rows = {name: np.array(values, dtype=float) for name, values in resident.items()}
    pass_s = (rows["decode_s"] - rows["stall_ms"] / 1e3).sum() / rows["tokens"].sum()
    prompt_s = (rows["ttft_s"] - rows["predictor_s"] - rows["prompt_stall_ms"] / 1e3).mean()
    more = max(rows["prompt_tokens"].mean() - 1, 1)
    found = replace(
        link_figures(handle.store, handle.link, read_s),
        pass_s=float(pass_s),
        row_s=float(max(prompt_s - pass_s, 0) / more),
    )
    costs = handle.misses.machine
    if costs is None:
        return found
    return replace(found, dram_bytes_per_s=costs.dram_bytes_per_s, host_row_s=costs.host_row_s)


def _predicted(
    record: Mapping[str, Any],
    counts: Mapping[str, list[int]],
    ttft_s: np.ndarray,
    decode_s: np.ndarray,
) -> dict[str, Any]:
    """Counts and seconds by the simulator, and how far both are from what was measured."""
    measured = record["per_prompt"]
    wrong = [name for name in counts if [int(v) for v in measured[name]] != counts[name]]
    tpot_s = float(decode_s.sum() / sum(counts["tokens"]))
    return {
        "counts": dict(counts),
        "counts_equal": not wrong,
        "counts_that_differ": wrong,
        "tpot_s": tpot_s,
        "ttft_s": float(ttft_s.mean()),
        "tpot_error": tpot_s / record["tpot_s"]["mean"] - 1,
        "ttft_error": float(ttft_s.mean()) / record["ttft_s"]["mean"] - 1,
        "tpot_ratio": bootstrap(decode_s, np.array(measured["decode_s"])).to_dict(),
    }


def _row(strategy: Strategy, record: Mapping[str, Any]) -> dict[str, Any]:
    """Make a row of the table."""
    predicted, measured = record["predicted"], record["tpot_s"]
    loads = sum(predicted["counts"]["loads"]) / sum(predicted["counts"]["tokens"])
    return {
        "strategy": strategy.name,
        "slots": strategy.slots,
        "hit_rate": record["hit_rate"]["mean"],
        "transfers_per_token_predicted": loads,
        "transfers_per_token_measured": record["transfers_per_token"]["mean"],
        "computed_there_per_token": record["computed_there_per_token"]["mean"],
        "adjusted_hit_rate": record["adjusted_hit_rate"]["mean"],
        **{
            name: (record.get(name) or {}).get("mean")
            for name in ("prefetch_precision", "prefetch_recall")
        },
        "counts_equal": predicted["counts_equal"],
        "predicted_ms": 1e3 * predicted["tpot_s"],
        "measured_ms": {key: 1e3 * measured[key] for key in ("mean", "low", "high")}
        | {"n": measured["n"]},
        "error_percent": 100 * predicted["tpot_error"],
    }


def _benchmark(
    rows: list[dict[str, Any]],
    label: str,
    prompts: int,
    max_new_tokens: int,
    link: tuple[float, float] | None,
    read_s: float,
) -> dict[str, Any]:
    """Make the record that `melinoe report` shows; what no strategy does has no column."""
    if not any(row["computed_there_per_token"] for row in rows):
        rows = [{**row, "computed_there_per_token": None} for row in rows]
    over = "the machine's own link"
    if link is not None:
        over = f"an emulated link of {link[0] / 1e9:g} GB/s, {link[1] * 1e6:g} us"
    return {
        "benchmark": "bench",
        "title": "Predicted and measured",
        "result": rows,
        "settings": {"model": label, "prompts": prompts, "max_new_tokens": max_new_tokens},
        "notes": [
            f"{label}: {prompts} prompts, {max_new_tokens} new tokens each, all strategies "
            f"in turn in one process, over {over}. Times are per token after the first.",
            f"Reading one expert took {1e3 * read_s:.3f} ms alone. Computing is "
            "taken from the run with every expert resident, so its own time is no prediction.",
            "The time in which the engine decides and waits is not predicted, nor what it costs to "
            "compute a request in pieces where a token uses more experts than there are slots.",
        ],
        "machine": machine(),
    }
