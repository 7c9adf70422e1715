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
    """Results of one model: scores by text, further records, loads at each cache size."""

    label: str
    scores: list[Any] = field(default_factory=list)
    more: list[dict[str, Any]] = field(default_factory=list)
    caches: dict[tuple[str, str, int], dict[str, list[int]]] = field(default_factory=dict)

    def records(self) -> list[dict[str, Any]]:
        """List all of it for `report`."""
        return [record for scores in self.scores for record in scores.records()] + self.more

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
    rouge: Annotated[bool, option("Also generate, and score ROUGE-L.", name="--rouge")] = False,
    answers: Annotated[
        bool, option("Also generate, and compare the number after '####'.", name="--answers")
    ] = False,
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
    from melinoe.evaluate import price_of_choice, score

    choice = models.choice_settings(given)
    texts = named_texts(data, other or [], split, limit, columns)  # before any model is read
    found: list[_Found] = []
    comparisons: list[Any] = []
    for name, label in _labels(model, other_model).items():
        one = _Found(label)
        loaded, handle, tokenizer = models.open_model(name, given, choose=False)
        for domain, (examples, in_domain) in texts.items():
            one.say(f"{domain}, {len(examples)} examples")
            one.scores.append(
                score(
                    loaded,
                    tokenizer,
                    examples,
                    label,
                    domain,
                    in_domain=in_domain,
                    rouge=rouge and in_domain,
                    answers=answers and in_domain,
                    max_length=max_length,
                    max_new_tokens=max_new_tokens,
                    batch_size=batch_size,
                    progress=one.say,
                )
            )
            if choice.kind != "exact":
                encoded = encode(examples, tokenizer, max_length)
                about: dict[str, Any] = {"in_domain": in_domain, "progress": one.say}
                record, priced = price_of_choice(
                    loaded, handle, encoded, choice, label, domain, **about
                )
                one.more.append(record)
                comparisons += priced
        if locality:
            examples = next(iter(texts.values()))[0][:prompts]
            lengths = (max_length, max_new_tokens)
            _locality(one, loaded, handle, tokenizer, examples, at_slots, *lengths)
        # One model in memory at a time; detaching would make it whole, which may not fit.
        del loaded, handle
        gc.collect()
        found.append(one)
        _append(out, one.records())
    comparisons += _compare(*found) if other_model else []
    compared = [comparison.to_record() for comparison in comparisons]
    _append(out, compared)
    records = [record for one in found for record in one.records()] + compared
    if as_json:
        output.show_json(records)
        return
    output.show_table("means with 95 % intervals over examples", list(_rows(records)))
    for line in [*remarks(records), *(comparison.sentence for comparison in comparisons)]:
        print(line)


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
    from melinoe.measure import completion_counts, curve_record, locality_record, reading_trace

    prompts = encode_prompts(examples, tokenizer, text_tokens=max_length)
    written = trace_prompts(loaded, handle, tokenizer, prompts, max_new_tokens, progress=one.say)
    # The same text for both models, too: one that repeats itself needs few experts.
    read = reading_trace(loaded, handle, encode(examples, tokenizer, max_length))
    shares = [experts_in_share(share, written.num_experts) for share in (0.125, 0.25, 0.5)]
    sizes = sorted(set(at_slots or shares))
    for doing, trace in (("writing", written), ("reading", read)):
        name = one.label if doing == "writing" else f"{one.label}, reading"
        one.more.append(locality_record(trace, name))
        for policy in ("lru", "lfu"):
            one.more.append(curve_record(trace, name, policy, sizes))
            for size in sizes:
                one.caches[doing, policy, size] = completion_counts(trace, size, policy)


def _compare(ours: _Found, theirs: _Found) -> list[Any]:
    """Compare the two models in everything that can be paired."""
    from melinoe.evaluate import compare_rates

    comparisons = []
    for one, two in zip(ours.scores, theirs.scores, strict=True):
        comparisons += one.against(two)
    for key, counts in ours.caches.items():
        base = theirs.caches.get(key)
        if base is None or not sum(base["loads"]):
            continue
        mine, rival = ((one["loads"], one["tokens"]) for one in (counts, base))
        metric = f"transfers per token {key[0]} ({key[1].upper()}, {key[2]} slots)"
        names = (ours.label, theirs.label, ours.scores[0].domain, metric)
        comparisons.append(compare_rates(mine, rival, *names))
    return comparisons


def _rows(records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Make the table: one row for each estimate."""
    for record in records:
        kind, named = record["kind"], {}
        if kind == "quality":
            named["perplexity"] = record["perplexity"]
        elif kind == "score":
            named[record["metric"].replace("_", " ")] = record["score"]
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


def remarks(records: list[dict[str, Any]]) -> list[str]:
    """Say what an interval over examples does not."""
    lines = []
    for record in records:
        if record["kind"] == "locality":
            lines.append(
                f"{record['model']}: all completions together use "
                f"{record['distinct_experts']:.1f} of {record['num_experts']} experts, mean over "
                "layers; caches were emptied before each prompt"
            )
        if record["kind"] == "score" and "right" in record:
            right, n = record["right"], record["score"]["n"]
            line = f"{record['model']}, {record['domain']}: {right} of {n} right"
            # All resamples are alike where all or none are right: the bootstrap has no width.
            most = 1 - 0.05 ** (1 / n)  # of errors or successes, none of which was seen
            if right == 0:
                line += f"; the rate is below {most:.1%} (95 %)"
            elif right == n:
                line += f"; the rate is above {1 - most:.1%} (95 %)"
            lines.append(line)
    return lines
