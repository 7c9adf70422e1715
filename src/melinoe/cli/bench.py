"""`melinoe bench`: serve prompts from caches of several sizes and policies, side by side."""

from typing import Annotated, Any

from melinoe.cli import models, options, output
from melinoe.cli.command import one_of, option, with_settings
from melinoe.config import MISSES, QUARTER, experts_in_share, policies
from melinoe.engine.options import Options

ALL_RESIDENT = "all resident"
# What the simulator counts of each prompt, by its name in a measured record.
_COUNTS = {"uses": "uses", "hits": "hits", "loads": "loads", "elsewhere": "on_host"}
_PANELS = {None: ("device",), "Engine": ("engine", "store", "format", "dtype", "miss")}


@with_settings(Options, _PANELS, engine="reference")
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
    raw: options.Raw = False,
    out: options.RecordsOut = None,
    as_json: options.AsJson = False,
    columns: options.Columns = None,
    split: options.Split = "test",
    link: Annotated[
        str | None, option("Emulate a link, as in 0.3GB/s; on the CPU.", "Engine")
    ] = None,
    prefetch: options.Prefetches = None,
    predictor: options.PredictorDir = None,
    popularity: options.PopularityFile = None,
    *,
    given: dict[str, Any],
) -> None:
    """Serve prompts from caches of several sizes and policies in turn; print what each costs."""
    from melinoe.plan.hardware import parse_bandwidth

    one_of(given["miss"], MISSES, "--miss")
    names = list(dict.fromkeys(policy or ["lru", "lfu"]))
    for name in names:
        one_of(name, policies(), "--policy")
    ahead = models.prefetchers(prefetch, predictor, popularity)
    bandwidth = None if link is None else parse_bandwidth(link, "link")

    from melinoe.checkpoint import load_tokenizer
    from melinoe.checkpoint.files import read_config
    from melinoe.data import load_examples
    from melinoe.engine.load import load
    from melinoe.engine.transfer import EmulatedLink
    from melinoe.errors import MelinoeError
    from melinoe.generate import trace_prompts
    from melinoe.measure import append_jsonl, serving, side_by_side

    output.quiet()
    path = models.resolve(model)
    experts = models.described(path).num_experts
    sizes = list(dict.fromkeys(slots or [experts_in_share(QUARTER, experts)]))
    models.check_slots(max(sizes), experts)
    examples = load_examples(data, split=split, limit=limit, columns=columns, prompts=True)
    tokenizer = load_tokenizer(path, read_config(path))
    prompts = models.prompt_ids(examples, tokenizer, raw)
    asked: Any = (tokenizer, prompts, max_new_tokens)

    def opened(size: int, name: str, **more: Any) -> tuple[Any, Any]:
        wire = None if bandwidth is None else EmulatedLink(bandwidth)  # none queues behind another
        return load(path, **{**given, "slots": size, "policy": name, "link": wire, **more})

    resident = opened(experts, "lru", miss="wait")
    store = resident[1].store
    kept = given["store"] if store.kind == "disk" else store
    output.say(f"tracing {len(prompts)} prompts with every expert resident")
    trace = trace_prompts(*resident, *asked)
    runs = [serving(*resident, *asked, strategy=ALL_RESIDENT, cold=False, label=model)]
    expected: list[Any] = [None]
    for size, name in ((size, name) for size in sizes for name in names):
        served = opened(size, name, store=kept)
        for ahead_name, one in ahead.items():
            if one is not None:
                one.bind(served[0], tokenizer)
            expected.append(_simulated(trace, size, name, one, prompts, served[1]))
            strategy = name if one is None else f"{name} + {ahead_name}"
            runs.append(serving(*served, *asked, prefetch=one, strategy=strategy, label=model))
    output.say(f"serving {len(prompts)} prompts by {len(runs)} strategies in turn")
    records = side_by_side(runs)
    for record in records if out is not None else ():
        append_jsonl(out, record)  # type: ignore[arg-type]
    if as_json:
        output.show_json(records)
    else:
        rows = [_row(one, given["miss"]) for one in records]
        output.show_table(f"{model}: {len(prompts)} prompts", rows)
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

    how: dict[str, Any] = {"prefetch": ahead, "prompts": prompts, "load": handle.misses.rule}
    how |= {"prefill": getattr(handle, "prefill", None), "engine": "residency"}
    done = simulate(trace, slots, policy, reset_between_sequences=True, **how)
    return {
        name: [int(getattr(one, ours)[COMPLETION].sum()) for one in done.per_sequence]
        for name, ours in _COUNTS.items()
    }


def _row(record: dict[str, Any], miss: str) -> dict[str, Any]:
    """Choose the columns of the table; a record has many more."""
    names = {"hit rate": "hit_rate", "loads / token": "transfers_per_token"}
    names |= {"on the CPU / token": "computed_there_per_token"} if miss != "wait" else {}
    names |= {"first token (s)": "ttft_s", "tokens / s": "tokens_per_s"}
    means = {name: record[key]["mean"] for name, key in names.items()}
    return {"strategy": record["strategy"], "slots": record["slots"], **means}
