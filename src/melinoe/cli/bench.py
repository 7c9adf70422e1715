"""`melinoe bench`: the strategies for real on this machine, predicted beside measured."""

from pathlib import Path
from typing import Annotated

import typer

from melinoe.cli import options


def command(
    model: options.Model,
    prompts: Annotated[str, typer.Option(help="Prompts: a JSONL file or hub data set.")],
    slots: Annotated[
        list[int] | None,
        typer.Option(help="Experts of each layer; may be repeated. Default: a quarter.", min=1),
    ] = None,
    policy: Annotated[
        list[str] | None, typer.Option(help="May be repeated. Default: lru and lfu.")
    ] = None,
    prefetch: Annotated[
        list[str] | None,
        typer.Option(
            help="none, learned, popularity; may be repeated. Default: none, and with --predictor "
            "all three."
        ),
    ] = None,
    predictor: Annotated[
        Path | None, typer.Option(help="What `melinoe predictor fit` wrote, for prefetches.")
    ] = None,
    prefetch_at: Annotated[
        str, typer.Option(help="prompt, before it is read; or completion, after it.")
    ] = "completion",
    max_new_tokens: Annotated[
        int, typer.Option(help="Tokens to generate for each prompt.", min=2)
    ] = 64,
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
    from typing import get_args

    from melinoe.generate import PrefetchAt
    from melinoe.plan.units import parse_bandwidth, parse_seconds

    kinds = ("none", "learned", "popularity")
    wanted = prefetch or (list(kinds) if predictor else ["none"])
    if unknown := [one for one in wanted if one not in kinds]:
        raise typer.BadParameter(
            f"{unknown[0]!r} is not one of {', '.join(kinds)}", param_hint="--prefetch"
        )
    if prefetch_at not in get_args(PrefetchAt):
        raise typer.BadParameter(
            f"{prefetch_at!r} is not one of {', '.join(get_args(PrefetchAt))}",
            param_hint="--prefetch-at",
        )
    emulated = None
    if link is not None:
        emulated = (parse_bandwidth(link, "link"), parse_seconds(link_latency))

    from melinoe.checkpoint import describe, load_tokenizer
    from melinoe.checkpoint.files import read_config
    from melinoe.config import ServeSettings, experts_in_share
    from melinoe.data import encode_prompt, load_examples
    from melinoe.errors import MelinoeError, UnsupportedModelError
    from melinoe.measure import append_jsonl
    from melinoe.plan.bench import Setting, bench
    from melinoe.plan.strategies import strategies
    from melinoe.predictor import Predictor
    from melinoe.report import render_table

    options.quiet()
    path = options.resolve(model)
    about = describe(path)
    if not about.supported:
        raise UnsupportedModelError(about.reason)
    chosen = strategies(
        about.num_experts,
        slots or [experts_in_share(ServeSettings().slots, about.num_experts)],
        policy or ["lru", "lfu"],
        wanted,
    )
    examples = load_examples(prompts, split=split, limit=limit)
    tokenizer = load_tokenizer(path, read_config(path))
    records, table = bench(
        Setting(
            path,
            device=options.resolve_device(device),
            dtype=dtype,
            store=store,
            link=emulated,
            max_new_tokens=max_new_tokens,
            prefetch_at=prefetch_at,  # type: ignore[arg-type]
            repeat=repeat,
        ),
        chosen,
        [encode_prompt(example, tokenizer) for example in examples],
        Predictor.load(predictor) if predictor else None,
        label=model,
        say=options.say,
    )
    if out is not None:
        for record in (*records, table):
            append_jsonl(out, record)
        options.say(f"wrote {len(records) + 1} records to {out}")
    if as_json:
        options.show_json({"records": records, "table": table})
    else:
        print(render_table([table]))
        far = [row for row in table["result"] if abs(row["error_percent"]) > 100 * tolerance]
        say = ", ".join(f"{row['strategy']} at {row['slots']}" for row in far)
        print(
            f"Predicted time is more than {tolerance:.0%} from the measured one for {say}."
            if far
            else f"Every predicted time is within {tolerance:.0%} of the measured one."
        )
    wrong = [row for row in table["result"] if not row["counts_equal"]]
    if wrong:
        names = ", ".join(f"{row['strategy']} at {row['slots']}" for row in wrong)
        raise MelinoeError(
            f"simulated and measured counts differ for {names}, which should be impossible with "
            "greedy decoding; please report it with the records (--out)"
        )
