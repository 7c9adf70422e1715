"""
Sentences computed from the records: captions under figures, and the findings at the top.

A sentence says that two means differ only where their intervals do not touch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from melinoe.report.amounts import apart, geometric_mean, inline, plain, signed
from melinoe.report.controls import about_control, is_priced
from melinoe.report.pairs import quotient
from melinoe.report.records import Measurements
from melinoe.report.schema import Record, read_estimate
from melinoe.report.tables import (
    Serving,
    change,
    domains,
    estimate,
    link_text,
    ordered_models,
    perplexity,
)
from melinoe.stats import Estimate

PREDICTIONS = {
    "empty": "an empty start",
    "popularity": "global popularity",
    "prefill": "the prefill's experts",
    "learned": "the learned predictor",
}


def join(parts: Sequence[str]) -> str:
    """Join phrases: ``a``, ``a and b``, ``a, b and c``."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def moved(before: Estimate, after: Estimate, words: tuple[str, str, str]) -> str:
    """Choose the word for lower, higher, or no difference that the intervals would bear."""
    if not apart(before, after):
        return words[2]
    return words[0] if after.mean < before.mean else words[1]


def locality(
    means: Mapping[str, Estimate], num_experts: int, whole: Mapping[str, float] | None = None
) -> str:
    """
    Say how many experts a sequence uses, and the fine-tuned model against the others.

    Args:
        means: By model, over sequences.
        num_experts: Of a layer.
        whole: By model, how many all sequences use together: what is fewer there too is narrowed
            for the whole set of texts, and not for each.
    """
    after = means.get("fine-tuned")
    others = [name for name in ("control", "base") if name in means]
    if after is None or not others:
        each = [f"{model} {inline(mean)}" for model, mean in means.items()]
        text = f"A sequence uses, of {num_experts} experts per layer: {join(each)}"
    else:
        words = ("fewer than", "more than", "no difference shown from")
        against = [
            f"{moved(means[name], after, words)} the {name}'s {inline(means[name])}"
            for name in others
        ]
        text = (
            f"A sequence of the fine-tuned model uses {inline(after)} of {num_experts} experts per "
            f"layer, {join(against)}"
        )
    if whole:
        each = [f"{model} {plain(count)}" for model, count in whole.items()]
        text += f". All sequences together use: {join(each)}"
    return f"{text}."


def policy_name(policy: str) -> str:
    """Write a policy's name as people do: ``LRU``, ``static``."""
    return policy.upper() if policy in ("lru", "lfu", "lfru") else policy


def curves(records: Mapping[tuple[str, ...], Record], slots: int) -> str:
    """Say what each policy hits at the measured number of slots nearest to *slots*."""
    some = next(iter(records.values()))
    at = min(some["slots"], key=lambda count: abs(count - slots))
    models = ordered_models(model for model, _ in records)
    parts = []
    policies = dict.fromkeys(policy for _, policy in records)
    for policy in sorted(policies, key=lambda name: name == "belady"):
        hits = [
            inline(value, "%") + (f" {model}" if len(models) > 1 else "")
            for model in models
            if (value := _hit_rate(records.get((model, policy)), at)) is not None
        ]
        name = "Belady, which knows the future," if policy == "belady" else policy_name(policy)
        if hits:
            parts.append(f"{name} hits {join(hits)}")
    return (
        f"With {at} of {some['num_experts']} experts resident, {'; '.join(parts)}. What is missing "
        "to 100 % is the miss ratio."
    )


def _hit_rate(record: Record | None, slots: int) -> Estimate | None:
    if record is None or slots not in record["slots"]:
        return None
    return read_estimate(record["hit_rate"][record["slots"].index(slots)])


def corpora(found: Measurements) -> str:
    """Say what training did to perplexity where it trained, and elsewhere."""
    sentences = []
    for in_domain, where in ((True, "in domain"), (False, "out of domain")):
        values = {
            model: value
            for model in ordered_models(record["model"] for record in found.of("quality"))
            if (value := perplexity(found, model, in_domain)) is not None
        }
        if values:
            said = [f"{model} {inline(value, digits=4)}" for model, value in values.items()]
            many = sum(inside is in_domain for _, inside in domains(found)) > 1
            mean = " (geometric mean)" if many else ""
            sentences.append(f"{where}{mean} {join(said)}")
    return f"Perplexity, lower is better: {'; '.join(sentences)}."


def predictor(records: Mapping[str, Record]) -> str:
    """Say which prediction finds the most experts, and whether the learned one earns its keep."""
    sentences = []
    for model, record in records.items():
        recall = {name: read_estimate(item) for name, item in record["recall"].items()}
        known = {name: item for name, item in recall.items() if item is not None}
        best = max(known, key=lambda name: known[name].mean)
        text = f"{model}: best {PREDICTIONS.get(best, best)}, {inline(known[best], '%')}"
        if (ceiling := read_estimate(record.get("ceiling"))) is not None:
            text += f" of at most {inline(ceiling, '%')}"
        rivals = [other for other in known if other != best]
        if rivals:
            second = max(rivals, key=lambda other: known[other].mean)
            text += f", then {PREDICTIONS.get(second, second)}, {inline(known[second], '%')}"
            if record.get("gain") is None and not apart(known[best], known[second]):
                text += " (intervals overlap)"
        if (gain := read_estimate(record.get("gain"))) is not None:
            text += f"; learned minus best rival, paired: {signed(gain).replace(' %', ' points')}"
            text += "" if gain.low > 0 else ", so learning did not measurably pay"
        winner = str(record.get("winner"))
        if (saved := read_estimate((record.get("saved") or {}).get(winner))) is not None:
            text += f"; loaded ahead, {PREDICTIONS.get(winner, winner)} saves {inline(saved)} "
            text += "transfers a token"
            text += "" if saved.low > 0 else ", so loading ahead was not shown to save any"
        sentences.append(text)
    slots = next(iter(records.values()))["slots"]
    return f"Recall with {slots} experts named per layer. {'. '.join(sentences)}."


def ends(log: Sequence[Mapping[str, Any]], term: str) -> tuple[float, float] | None:
    """Mean of a loss over the first and over the last twentieth of its steps."""
    values = [float(row[term]) for row in log if row.get(term) is not None]
    if not values:
        return None
    some = max(1, len(values) // 20)
    return sum(values[:some]) / some, sum(values[-some:]) / some


def start_to_end(log: Sequence[Mapping[str, Any]], term: str) -> str:
    """Write a loss's way: ``3.62 → 3.51``."""
    found = ends(log, term)
    return "n/a" if found is None else f"{plain(found[0])} → {plain(found[1])}"


def training(
    logs: Mapping[str, Sequence[Mapping[str, Any]]],
    terms: Mapping[str, str],
    rules: Mapping[str, str],
) -> str:
    """
    Say where each loss began and ended, model by model; those of one choice rule beside each other.

    Args:
        logs: By model.
        terms: Losses, and their names for people.
        rules: By model, how experts were chosen while it trained.
    """
    groups = list(dict.fromkeys(rules.values()))
    said = []
    for rule in groups:
        sentences = []
        for term, name in terms.items():
            each = [
                f"{model} {start_to_end(log, term)}"
                for model, log in logs.items()
                if rules[model] == rule and ends(log, term) is not None
            ]
            if each:
                sentences.append(f"{name} {join(each)}")
        if sentences:
            said.append((f"{rule}: " if len(groups) > 1 else "") + "; ".join(sentences))
    text = f"From the first to the last twentieth of the steps: {'. '.join(said)}."
    if len(groups) > 1:
        text += " Losses under one rule do not compare with those under the other."
    return text


def findings(found: Measurements, serving: Serving) -> list[str]:
    """Say what the main table shows: transfers, quality and speed of the fine-tuned model."""
    base, tuned = serving.run("base"), serving.run("fine-tuned")
    if base is None or tuned is None:
        return []
    return [
        text
        for text in (
            _transfers(base, tuned, serving.run("control")),
            _price(found, serving.run("control") is not None),
            *_speeds(serving),
        )
        if text is not None
    ]


def _transfers(base: Record, tuned: Record, control: Record | None) -> str | None:
    before, after = estimate(base, "transfers_per_token"), estimate(tuned, "transfers_per_token")
    if before is None or after is None:
        return None
    fewer = after.mean < before.mean
    runs = (base, tuned) if fewer else (tuned, base)
    times = quotient(*runs, "transfers_per_token")
    if times is None or times.n < 2 or times.low <= 1:
        return (
            "No change in expert transfers shown: per token "
            f"{inline(before)} base, {inline(after)} fine-tuned."
        )
    text = (
        f"The fine-tuned model needs {inline(times)} times {'fewer' if fewer else 'more'} expert "
        f"transfers per token than the base: {inline(after)} instead of {inline(before)}"
    )
    # Any fine-tuning changes locality; only the step from the control is the locality terms' doing.
    middle = estimate(control, "transfers_per_token")
    if control is None or middle is None:
        return f"{text}."
    runs = (control, tuned) if after.mean < middle.mean else (tuned, control)
    times = quotient(*runs, "transfers_per_token")
    if times is None or times.n < 2 or times.low <= 1:
        return f"{text}; against the control, {inline(middle)}, no change shown."
    word = "fewer" if after.mean < middle.mean else "more"
    return f"{text}; against the control, {inline(middle)}, {inline(times)} times {word}."


def increase(found: Measurements, in_domain: bool) -> Estimate | None:
    """Perplexity of fine-tuned over control minus 1, paired, where the records hold it."""
    latest = {
        record["domain"]: read_estimate(record.get("increase_over_control"))
        for record in found.of("quality")
        if record["model"] == "fine-tuned" and record["in_domain"] is in_domain
    }
    factors = [
        Estimate(1 + item.mean, 1 + item.low, 1 + item.high, item.n)
        for item in latest.values()
        if item is not None
    ]
    if not factors or len(factors) < len(latest):
        return None
    mean = factors[0] if len(factors) == 1 else geometric_mean(factors)
    return Estimate(mean.mean - 1, mean.low - 1, mean.high - 1, mean.n)


def _price(found: Measurements, has_control: bool) -> str | None:
    parts = []
    for in_domain, where in ((True, "in domain"), (False, "out of domain")):
        tuned = perplexity(found, "fine-tuned", in_domain)
        control = perplexity(found, "control", in_domain)
        if tuned is None or control is None:
            continue
        paired = increase(found, in_domain)
        unclear = "" if paired is not None or apart(tuned, control) else ", intervals overlap"
        amount = change(tuned, control) if paired is None else signed(paired)
        parts.append(
            f"{amount} {where} ({inline(tuned, digits=4)} against "
            f"{inline(control, digits=4)}{unclear})"
        )
    if not parts:
        return None if has_control else "No control was measured, so the price is not known."
    if is_priced(found):
        return f"Its price in perplexity, over {about_control(found)}: {join(parts)}."
    return f"Its perplexity is {join(parts)}, over {about_control(found)}."


def _speeds(serving: Serving) -> list[str]:
    said = []
    for link in serving.links:
        before = estimate(serving.runs["base"].get(link), "tokens_per_s")
        after = estimate(serving.runs["fine-tuned"].get(link), "tokens_per_s")
        if before is not None and after is not None:
            runs = (serving.runs["fine-tuned"][link], serving.runs["base"][link])
            factor = quotient(*runs, "tokens_per_s")
            times = f", {inline(factor)} times the base's" if factor is not None else ", base"
            said.append(
                f"Over the {link_text(link)} it writes {inline(after)} tokens a second{times} "
                f"{inline(before)}."
            )
    return said
