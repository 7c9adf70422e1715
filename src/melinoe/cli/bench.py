"""`melinoe bench`: the strategies for real on this machine, predicted beside measured."""

from pathlib import Path
from typing import Annotated, Any

import typer

from melinoe.cli import options, prefetching


def command(
    model: options.Model,
    prompts: Annotated[
        str, typer.Option("--prompts", "--data", help="Prompts: a file or hub data set.")
    ],
    slots: Annotated[
        list[int] | None,
        typer.Option(help="Experts of each layer; may be repeated. Default: a quarter.", min=1),
    ] = None,
    policy: Annotated[
        list[str] | None, typer.Option(help="May be repeated. Default: lru and lfu.")
    ] = None,
    miss: Annotated[
        list[str] | None,
        typer.Option(
            help="What is done about a miss: wait, until the expert is there; cpu, compute it "
            "where it is; split, by measured costs; may be repeated. Default: wait."
        ),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            help="reference: runs everywhere; fast: needs a GPU, lru or lfu, and waits for misses; "
            "both, one beside the other."
        ),
    ] = "reference",
    prefetch: Annotated[
        list[str] | None,
        typer.Option(
            help=f"What is loaded ahead of need: {prefetching.NAMES}; may be repeated. Default: "
            "none, and what the files given are for."
        ),
    ] = None,
    predictor: prefetching.PredictorDir = None,
    popularity: prefetching.PopularityFile = None,
    prefetch_at: prefetching.Moment = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="Tokens to generate for each prompt.", min=2)
    ] = 64,
    columns: options.Columns = None,
    limit: Annotated[int, typer.Option(help="Use only the first examples.", min=1)] = 8,
    split: Annotated[str, typer.Option(help="Split of a hub data set.")] = "test",
    repeat: Annotated[int, typer.Option(help="Runs of each prompt, the median counts.", min=1)] = 1,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    store: options.StoreKind = "auto",
    link: Annotated[
        str | None,
        typer.Option(help="Emulate a link of this bandwidth, as in 0.3GB/s; on the CPU only."),
    ] = None,
    link_latency: Annotated[str, typer.Option(help="Of each transfer on it, as in 10us.")] = "0us",
    tolerance: Annotated[
        float, typer.Option(help="Error of a predicted time that passes, as a share.", min=0)
    ] = 0.1,
    out: Annotated[
        Path | None, typer.Option(help="Append the records to this .jsonl, for `melinoe report`.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Run strategies for real, in turn, and print what the simulator predicted beside each."""
    from melinoe.plan.units import parse_bandwidth, parse_seconds

    wanted = prefetching.names_of(prefetch, prefetch_at, predictor=predictor, popularity=popularity)
    if not prefetch and wanted != ("none",):
        # A predictor also knows what is popular, which is its first rival.
        also = ("popularity",) if predictor and popularity is None else ()
        wanted = ("none", *also, *wanted)
    options.check_misses(miss or [])
    if engine not in ("reference", "fast", "both"):
        raise typer.BadParameter(
            f"{engine!r} is not one of reference, fast, both", param_hint="--engine"
        )
    engines = ("reference", "fast") if engine == "both" else (engine,)
    emulated = None
    if link is not None:
        emulated = (parse_bandwidth(link, "link"), parse_seconds(link_latency))

    from melinoe.checkpoint import describe, load_tokenizer
    from melinoe.checkpoint.files import read_config
    from melinoe.config import ServeSettings, experts_in_share
    from melinoe.data import encode_prompts, load_examples
    from melinoe.errors import MelinoeError, UnsupportedModelError
    from melinoe.measure import append_jsonl
    from melinoe.plan.bench import Setting, bench
    from melinoe.plan.runtimes import check_fast
    from melinoe.plan.strategies import strategies
    from melinoe.predictor import Predictor
    from melinoe.report import render_table

    options.quiet()
    guess = Predictor.load(predictor) if predictor else None
    made_of = prefetching.given(guess, popularity, prefetch_at)
    path = options.resolve(model)
    about = describe(path)
    if not about.supported:
        raise UnsupportedModelError(about.reason)
    chosen = strategies(
        about.num_experts,
        slots or [experts_in_share(ServeSettings().slots, about.num_experts)],
        policy or ["lru", "lfu"],
        wanted,
        miss or ["wait"],
        engines,
    )
    target = options.resolve_device(device)
    if "fast" in engines:
        check_fast(target, emulated is not None)
    examples = load_examples(prompts, split=split, limit=limit, columns=columns, prompts=True)
    tokenizer = load_tokenizer(path, read_config(path))
    records, moments, table = bench(
        Setting(
            path,
            device=target,
            dtype=dtype,
            store=store,
            link=emulated,
            max_new_tokens=max_new_tokens,
            repeat=repeat,
        ),
        chosen,
        encode_prompts(examples, tokenizer),
        made_of,
        label=model,
        say=options.say,
    )
    if out is not None:
        for record in (*records, moments, table):
            append_jsonl(out, record)
        options.say(f"wrote {len(records) + 2} records to {out}")
    if as_json:
        options.show_json({"records": records, "timeline": moments, "table": table})
    else:
        print(render_table([_short(table)]))
        far = [row for row in table["result"] if abs(row["error_percent"]) > 100 * tolerance]
        say = ", ".join(f"{row['strategy']} at {row['slots']}" for row in far)
        print(
            f"Predicted time is more than {tolerance:.0%} from the measured one for {say}."
            if far
            else f"Every predicted time is within {tolerance:.0%} of the measured one."
        )
        if all(row["counts_equal"] for row in table["result"]):
            print("Predicted and measured counts are equal, prompt by prompt, for every strategy.")
    wrong = [row for row in table["result"] if not row["counts_equal"]]
    if wrong:
        names = ", ".join(f"{row['strategy']} at {row['slots']}" for row in wrong)
        raise MelinoeError(
            f"simulated and measured counts differ for {names}, which should be impossible with "
            "greedy decoding; please report it with the records (--out)"
        )


def _short(table: dict[str, Any]) -> dict[str, Any]:
    """The table in columns that a terminal has room for; the record has all of them."""
    rows = [
        {
            "strategy": row["strategy"],
            "slots": row["slots"],
            "hit rate": row["hit_rate"],
            "loads / token": row["transfers_per_token_measured"],
            "computed there": row["computed_there_per_token"],
            "predicted_ms": row["predicted_ms"],
            "measured_ms": row["measured_ms"],
            "error_percent": row["error_percent"],
        }
        for row in table["result"]
    ]
    return {**table, "result": rows}
