"""`melinoe bench`: serve prompts from caches of several sizes and policies, side by side."""

from typing import Annotated, Any

from melinoe.cli import models, options, output
from melinoe.cli.command import one_of, option
from melinoe.config import MISSES, QUARTER, experts_in_share, policies

ALL_RESIDENT = "all resident"
_ENGINE = "Engine"
# What the simulator counts of each prompt, by its name in a measured record.
_COUNTS = {"uses": "uses", "hits": "hits", "loads": "loads", "elsewhere": "on_host"}


def command(
    model: options.Model,
    data: options.Prompts,
    limit: Annotated[int, option("Use only the first examples.", min=1)] = 8,
    slots: Annotated[
        list[int] | None,
        option("Resident experts of each layer. Repeatable. Default: a quarter.", min=1),
    ] = None,
    policy: Annotated[
        list[str] | None, option("Which expert is evicted first. Repeatable. Default: lru and lfu.")
    ] = None,
    max_new_tokens: Annotated[int, option("Generate at most this many tokens.", min=2)] = 64,
    device: Annotated[
        str | None, option("cpu or cuda. Default: CUDA if there is one, else the CPU.")
    ] = None,
    raw: options.Raw = False,
    out: options.RecordsOut = None,
    as_json: options.AsJson = False,
    columns: options.Columns = None,
    split: options.Split = "test",
    engine: Annotated[str, option("Who decides: reference or fast.", _ENGINE)] = "reference",
    store: Annotated[
        str, option("Where other experts wait: auto, ram, pinned or disk.", _ENGINE)
    ] = "auto",
    format: Annotated[
        str | None, option("Pack experts while they load: int8, int4, ...", _ENGINE)
    ] = None,
    dtype: Annotated[
        str, option("Type of the weights: auto (as stored), float32 or bfloat16.", _ENGINE)
    ] = "auto",
    miss: Annotated[str, option("On a miss: wait, cpu or split.", _ENGINE)] = "wait",
    link: Annotated[
        str | None, option("Emulate a link, as in 0.3GB/s; on the CPU.", _ENGINE)
    ] = None,
    prefetch: options.Prefetches = None,
    predictor: options.PredictorDir = None,
    popularity: options.PopularityFile = None,
) -> None:
    """Serve prompts from caches of several sizes and policies in turn; print what each costs."""
    from melinoe.plan.hardware import parse_bandwidth

    one_of(miss, MISSES, "--miss")
    names = list(dict.fromkeys(policy or ["lru", "lfu"]))
    for name in names:
        one_of(name, policies(), "--policy")
    ahead = models.prefetchers(prefetch, predictor, popularity)
    bandwidth = None if link is None else parse_bandwidth(link, "link")

    from melinoe.checkpoint import describe, load_tokenizer
    from melinoe.checkpoint.files import read_config
    from melinoe.data import load_examples
    from melinoe.engine.load import load
    from melinoe.engine.transfer import EmulatedLink
    from melinoe.errors import BudgetError, MelinoeError, UnsupportedModelError
    from melinoe.generate import trace_prompts
    from melinoe.measure import append_jsonl, serving, side_by_side

    output.quiet()
    path = models.resolve(model)
    about = describe(path)
    if not about.supported:
        raise UnsupportedModelError(about.reason)
    sizes = list(dict.fromkeys(slots or [experts_in_share(QUARTER, about.num_experts)]))
    if max(sizes) > about.num_experts:
        raise BudgetError(
            f"{max(sizes)} slots cannot be in layers of {about.num_experts} experts; choose from 1 "
            f"to {about.num_experts}"
        )
    examples = load_examples(data, split=split, limit=limit, columns=columns, prompts=True)
    tokenizer = load_tokenizer(path, read_config(path))
    prompts = models.prompt_ids(examples, tokenizer, raw)
    asked: Any = (tokenizer, prompts, max_new_tokens)
    common: dict[str, Any] = {"engine": engine, "dtype": dtype, "format": format}

    def opened(size: int, name: str, kept: Any, **more: Any) -> tuple[Any, Any]:
        wire = None if bandwidth is None else EmulatedLink(bandwidth)  # none queues behind another
        more |= {"slots": size, "policy": name, "store": kept, "link": wire}
        return load(path, models.resolve_device(device), **common, **more)

    resident = opened(about.num_experts, "lru", store)
    kept = store if resident[1].store.kind == "disk" else resident[1].store
    output.say(f"tracing {len(prompts)} prompts with every expert resident")
    trace = trace_prompts(*resident, *asked)
    how: dict[str, Any] = {"label": model}
    runs = [serving(*resident, *asked, strategy=ALL_RESIDENT, cold=False, **how)]
    expected: list[Any] = [None]
    for size in sizes:
        for name in names:
            served = opened(size, name, kept, miss=miss)
            for ahead_name, one in ahead.items():
                if one is not None:
                    one.bind(served[0], tokenizer)
                expected.append(_simulated(trace, size, name, one, prompts, served[1]))
                strategy = name if one is None else f"{name} + {ahead_name}"
                of = {"prefetch": one, "strategy": strategy, **how}
                runs.append(serving(*served, *asked, **of))
    output.say(f"serving {len(prompts)} prompts by {len(runs)} strategies in turn")
    records = side_by_side(runs)
    if out is not None:
        for record in records:
            append_jsonl(out, record)
    if as_json:
        output.show_json(records)
    else:
        output.show_table(f"{model}: {len(prompts)} prompts", [_row(one, miss) for one in records])
    wrong = [
        f"{record['strategy']} at {record['slots']}"
        for record, counts in zip(records, expected, strict=True)
        if counts is not None and any(record["per_prompt"][k] != v for k, v in counts.items())
    ]
    if wrong:
        raise MelinoeError(
            f"simulated and measured counts differ for {', '.join(wrong)}, which should be "
            "impossible with greedy decoding; please report it with the records (--out)"
        )


def _simulated(
    trace: Any, slots: int, policy: str, ahead: Any, prompts: Any, handle: Any
) -> dict[str, list[int]]:
    """Count, prompt by prompt, what the simulator expects of a strategy's completions."""
    from melinoe.cache.counters import COMPLETION
    from melinoe.cache.simulator import simulate

    done = simulate(
        trace,
        slots,
        policy,
        prefetch=ahead,
        prompts=prompts,
        reset_between_sequences=True,
        load=handle.misses.rule,
        prefill=getattr(handle, "prefill", None),
        engine="residency",
    )
    return {
        name: [int(getattr(one, ours)[COMPLETION].sum()) for one in done.per_sequence]
        for name, ours in _COUNTS.items()
    }


def _row(record: dict[str, Any], miss: str) -> dict[str, Any]:
    """Choose the columns of the table; a record has many more."""
    names = {
        "hit rate": "hit_rate",
        "loads / token": "transfers_per_token",
        "on the CPU / token": "computed_there_per_token",
        "first token (s)": "ttft_s",
        "tokens / s": "tokens_per_s",
    }
    means = {name: record[key]["mean"] for name, key in names.items()}
    if miss == "wait":
        del means["on the CPU / token"]
    return {"strategy": record["strategy"], "slots": record["slots"], **means}
