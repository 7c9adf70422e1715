"""`melinoe bench`: serve prompts by several strategies, with predicted beside measured cost."""

from typing import Annotated, Any

from melinoe.cli import models, options, output
from melinoe.cli.command import one_of, option
from melinoe.config import MISSES, QUARTER, experts_in_share

_LINK = "Link and prediction"
_ENGINE = "Engine"
_TOLERANCE = 10  # per cent between predicted and measured times that is not named


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
    repeat: Annotated[int, option("Serve each prompt this often, and take the median.", min=1)] = 1,
    device: Annotated[
        str | None, option("cpu or cuda. Default: CUDA if there is one, else the CPU.")
    ] = None,
    raw: options.Raw = False,
    out: options.RecordsOut = None,
    as_json: options.AsJson = False,
    columns: options.Columns = None,
    split: options.Split = "test",
    engine: Annotated[
        str, option("reference, fast (needs a GPU), or both.", _ENGINE)
    ] = "reference",
    store: Annotated[
        str, option("Where other experts wait: auto, ram, pinned or disk.", _ENGINE)
    ] = "auto",
    dtype: Annotated[
        str, option("Type of the weights: auto (as stored), float32 or bfloat16.", _ENGINE)
    ] = "auto",
    miss: Annotated[
        list[str] | None,
        option("On a miss: wait, cpu or split. Repeatable. Default: wait.", _ENGINE),
    ] = None,
    prefetch: options.Prefetches = None,
    predictor: options.PredictorDir = None,
    popularity: options.PopularityFile = None,
    link: Annotated[str | None, option("Emulate a link, as in 0.3GB/s; on the CPU.", _LINK)] = None,
    link_latency: Annotated[str, option("Latency of its transfers, as in 10us.", _LINK)] = "0us",
) -> None:
    """Serve prompts by several strategies in turn; print predicted beside measured cost."""
    from melinoe.plan.hardware import parse_bandwidth, parse_seconds

    one_of(engine, ("reference", "fast", "both"), "--engine")
    for way in miss or ():
        one_of(way, MISSES, "--miss")
    if not prefetch and (predictor or popularity):
        # A predictor also knows what is popular, which is its first rival.
        prefetch = ["none", "popularity", *(["predictor"] if predictor else [])]
    ahead = models.prefetchers(prefetch, predictor, popularity)
    emulated = (
        None if link is None else (parse_bandwidth(link, "link"), parse_seconds(link_latency))
    )
    engines = ("reference", "fast") if engine == "both" else (engine,)

    from melinoe.checkpoint import describe, load_tokenizer
    from melinoe.checkpoint.files import read_config
    from melinoe.data import load_examples
    from melinoe.errors import MelinoeError, UnsupportedModelError
    from melinoe.measure import append_jsonl
    from melinoe.plan.bench import bench, check_fast, strategies
    from melinoe.report import render_table

    output.quiet()
    path = models.resolve(model)
    about = describe(path)
    if not about.supported:
        raise UnsupportedModelError(about.reason)
    quarter = experts_in_share(QUARTER, about.num_experts)
    chosen = strategies(
        about.num_experts,
        slots or [quarter],
        policy or ["lru", "lfu"],
        list(ahead),
        miss or ["wait"],
        engines,
    )
    target = models.resolve_device(device)
    if "fast" in engines:
        check_fast(target, emulated is not None)
    examples = load_examples(data, split=split, limit=limit, columns=columns, prompts=True)
    records, moments, table = bench(
        path,
        chosen,
        models.prompt_ids(examples, load_tokenizer(path, read_config(path)), raw),
        ahead,
        label=model,
        device=target,
        dtype=dtype,
        store=store,
        link=emulated,
        max_new_tokens=max_new_tokens,
        repeat=repeat,
        say=output.say,
    )
    if out is not None:
        for record in (*records, moments, table):
            append_jsonl(out, record)
        output.say(f"wrote {len(records) + 2} records to {out}")
    rows = table["result"]
    if as_json:
        output.show_json({"records": records, "timeline": moments, "table": table})
    else:
        print(render_table([{**table, "result": [_short(row) for row in rows]}]))
        far = _names(row for row in rows if abs(row["error_percent"]) > _TOLERANCE)
        print(
            f"Predicted time is more than {_TOLERANCE} % from the measured one for {far}."
            if far
            else f"Every predicted time is within {_TOLERANCE} % of the measured one."
        )
    if wrong := _names(row for row in rows if not row["counts_equal"]):
        raise MelinoeError(
            f"simulated and measured counts differ for {wrong}, which should be impossible with "
            "greedy decoding; please report it with the records (--out)"
        )
    if not as_json:
        print("Predicted and measured counts are equal, prompt by prompt, for every strategy.")


def _names(rows: Any) -> str:
    return ", ".join(f"{row['strategy']} at {row['slots']}" for row in rows)


def _short(row: dict[str, Any]) -> dict[str, Any]:
    """Choose the columns that a terminal has room for; the record has all of them."""
    return {
        "strategy": row["strategy"],
        "slots": row["slots"],
        "hit rate": row["hit_rate"],
        "loads / token": row["transfers_per_token_measured"],
        "computed there": row["computed_there_per_token"],
        "predicted_ms": row["predicted_ms"],
        "measured_ms": row["measured_ms"],
        "error_percent": row["error_percent"],
    }
