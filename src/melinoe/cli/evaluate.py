"""`melinoe evaluate`: measure how well one model does, or how two differ, with intervals."""

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from melinoe.cli import models, options, output
from melinoe.cli.command import option
from melinoe.cli.texts import named_texts

_LOCALITY = "With --locality"


@dataclass
class _Found:
    """Results of one model: losses by text, all records, loads and tokens by metric."""

    label: str
    losses: dict[str, Any] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    rates: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    def say(self, text: str) -> None:
        """Tell of progress."""
        output.say(f"{self.label}: {text}")


@options.serving()
def command(
    model: options.Model,
    data: Annotated[str, option("Held-out examples: a file, a directory, or a hub data set.")],
    other_model: Annotated[
        str | None, typer.Argument(help="A second model to compare with, example by example.")
    ] = None,
    limit: options.Limit = None,
    locality: Annotated[
        bool, option("Also trace: experts used, loads for each token.", name="--locality")
    ] = False,
    out: options.RecordsOut = None,
    as_json: options.AsJson = False,
    other: options.Other = None,
    columns: options.Columns = None,
    split: options.Split = "test",
    max_length: Annotated[int, option("Longest sequence, in tokens.", options.DATA, min=2)] = 512,
    max_new_tokens: Annotated[int, option("Generate at most so many.", options.DATA, min=1)] = 256,
    batch_size: Annotated[int, option("Sequences in one forward pass.", options.DATA, min=1)] = 8,
    prompts: Annotated[int, option("Trace this many prompts.", _LOCALITY, min=1)] = 32,
    at_slots: Annotated[
        list[int] | None,
        option("Simulate so many slots. Repeatable. Default: 1/8, 1/4, 1/2.", _LOCALITY, min=1),
    ] = None,
    *,
    given: dict[str, Any],
) -> None:
    """
    Measure quality and locality of one model, or how two differ, with 95 % intervals.

    With --choice cache-prior the texts are read both ways, which says what that costs and saves.
    """
    if at_slots and not locality:
        raise typer.BadParameter("goes with --locality", param_hint="--at-slots")
    from melinoe.data import encode
    from melinoe.evaluate import perplexity, price_of_choice, quality_record

    choice = models.choice_settings(given)
    texts = named_texts(data, other or [], split, limit, columns)  # before any model is read
    found: list[_Found] = []
    comparisons: list[Any] = []
    for name, label in _labels(model, other_model).items():
        one = _Found(label)
        loaded, handle, tokenizer = models.open_model(name, given, choose=False)
        for domain, (examples, in_domain) in texts.items():
            one.say(f"{domain}, {len(examples)} examples")
            encoded = encode(examples, tokenizer, max_length)
            one.losses[domain] = perplexity(loaded, encoded, batch_size)
            one.records.append(quality_record(one.losses[domain], label, domain, in_domain))
            if choice.kind != "exact":
                about: dict[str, Any] = {"in_domain": in_domain, "progress": one.say}
                record, priced = price_of_choice(
                    loaded, handle, encoded, choice, label, domain, **about
                )
                one.records.append(record)
                comparisons += priced
        if locality:
            examples = next(iter(texts.values()))[0][:prompts]
            lengths = (max_length, max_new_tokens)
            _locality(one, loaded, handle, tokenizer, examples, at_slots, *lengths)
        # One model in memory at a time; detaching would make it whole, which may not fit.
        del loaded, handle
        gc.collect()
        found.append(one)
        _append(out, one.records)
    comparisons += _compare(*found) if other_model else []
    compared = [comparison.to_record() for comparison in comparisons]
    _append(out, compared)
    records = [record for one in found for record in one.records] + compared
    if as_json:
        output.show_json(records)
        return
    output.show_table("means with 95 % intervals over examples", list(_rows(records)))
    for record in records:
        if record["kind"] == "locality":
            print(
                f"{record['model']}: all completions together use "
                f"{record['distinct_experts']:.1f} of {record['num_experts']} experts, mean over "
                "layers; caches were emptied before each prompt"
            )
    for comparison in comparisons:
        print(comparison.sentence)


def _append(out: Path | None, records: Sequence[dict[str, Any]]) -> None:
    """Append records as soon as they are measured, because what comes later may fail."""
    from melinoe.measure import append_jsonl, machine

    if out is not None and records:
        facts = machine()
        for record in records:
            append_jsonl(out, {**record, "machine": facts})
        output.say(f"appended {len(records)} records to {out}")


def _labels(model: str, other: str | None) -> dict[str, str]:
    """Map each model to a short name, or to itself where the short names would be equal."""
    given = [model] if other is None else [model, other]
    if len(set(given)) < len(given):
        raise typer.BadParameter("the two models are one", param_hint="OTHER_MODEL")
    short = [Path(name).resolve().name if Path(name).is_dir() else name for name in given]
    return dict(zip(given, short if len(set(short)) == len(given) else given, strict=True))


def _locality(
    one: _Found,
    loaded: Any,
    handle: Any,
    tokenizer: Any,
    examples: Sequence[Any],
    at_slots: Sequence[int] | None,
    max_length: int,
    max_new_tokens: int,
) -> None:
    """Trace texts written and read, and simulate the loads of caches of each size."""
    from melinoe.config import experts_in_share
    from melinoe.data import encode, encode_prompts
    from melinoe.generate import trace_prompts
    from melinoe.measure import completion_costs, locality_record, rates_by_slots, reading_trace

    prompts = encode_prompts(examples, tokenizer, text_tokens=max_length)
    written = trace_prompts(loaded, handle, tokenizer, prompts, max_new_tokens, progress=one.say)
    # The same text for both models, too: one that repeats itself needs few experts.
    read = reading_trace(loaded, handle, encode(examples, tokenizer, max_length))
    shares = [experts_in_share(share, written.num_experts) for share in (0.125, 0.25, 0.5)]
    sizes = sorted(set(at_slots or shares))
    for doing, trace in (("writing", written), ("reading", read)):
        name = one.label if doing == "writing" else f"{one.label}, reading"
        one.records.append(locality_record(trace, name))
        for policy in ("lru", "lfu"):
            costs = completion_costs(trace, sizes, policy)
            about: dict[str, Any] = {"kind": "curve", "model": name, "policy": policy}
            about |= {"num_experts": trace.num_experts}
            one.records.append(about | rates_by_slots(sizes, costs))
            for size, loads in zip(sizes, costs.loads, strict=True):
                metric = f"transfers per token {doing} ({policy.upper()}, {size} slots)"
                one.rates[metric] = (loads, costs.tokens)


def _compare(ours: _Found, theirs: _Found) -> list[Any]:
    """Compare the two models in everything that can be paired."""
    from melinoe.evaluate import compare_perplexity, compare_rates

    found = [
        compare_perplexity(one, theirs.losses[domain], ours.label, theirs.label, domain)
        for domain, one in ours.losses.items()
    ]
    for metric in ours.rates:
        if metric in theirs.rates and theirs.rates[metric][0].any():
            names = (ours.label, theirs.label, next(iter(ours.losses)), metric)
            found.append(compare_rates(ours.rates[metric], theirs.rates[metric], *names))
    return found


def _rows(records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Make the table: one row for each estimate."""
    for record in records:
        kind, named = record["kind"], {}
        if kind == "quality":
            named["perplexity"] = record["perplexity"]
        elif kind == "locality":
            named["experts per sequence"] = record["experts_per_sequence_mean"]
            named["reuse"] = record["reuse"]
        elif kind == "curve":
            for size, value in zip(record["slots"], record["transfers_per_token"], strict=True):
                named[f"transfers per token, {record['policy'].upper()}, {size} slots"] = value
        text = record.get("domain", "completions")
        for measure, value in named.items():
            yield {"model": record["model"], "text": text, "measure": measure, **value}
        for name, rate in record.get("transfers", {}).items() if kind == "quality" else ():
            yield {"model": name, "text": text, "measure": record["transfers_metric"], **rate}
