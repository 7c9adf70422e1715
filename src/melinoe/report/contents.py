"""Arrange a report's contents in reading order, free of markup, for the page and its twin."""

from dataclasses import dataclass, field
from typing import Any

from melinoe.report.amounts import (
    Facts,
    apart,
    change,
    flat,
    hardware,
    inline,
    join,
    label,
    say,
    signed,
)
from melinoe.report.comparing import (
    about_control,
    increase_over_control,
    perplexity,
    quotient,
    unlike_control,
)
from melinoe.report.figures.caches import curves, layers
from melinoe.report.figures.corpora import corpora
from melinoe.report.figures.experts import locality, usage
from melinoe.report.figures.losses import training
from melinoe.report.figures.predictor import predictor
from melinoe.report.figures.svg import Figure
from melinoe.report.figures.timeline import timeline
from melinoe.report.records import Measurements, Record, estimate
from melinoe.report.table import Table
from melinoe.report.tables import (
    Serving,
    benchmark_tables,
    comparison_table,
    corpus_table,
    link_text,
    main_table,
    score_table,
    servings,
    time_table,
    transfer_table,
)

EMULATED = (
    "An emulated link makes each transfer last as long as the printed bandwidth and latency say. "
    "It is for comparing strategies on a machine without a separate fast memory; it is not the "
    "speed of any hardware."
)
UNMODIFIED = (
    "Over the unmodified link experts come from this machine's own storage, usually from pages "
    "that the operating system holds in memory already: transfers are cheap, so differences in "
    "speed are small."
)


@dataclass
class Section:
    """One part of a report."""

    name: str
    title: str
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    facts: dict[str, Facts] = field(default_factory=dict)


@dataclass
class Report:
    """A whole report: facts and findings at the top, sections, limits and notes at the end."""

    title: str
    facts: Facts
    findings: list[str]
    sections: list[Section]
    limits: list[str]
    notes: list[str]


def _machine(found: Measurements) -> dict[str, Any]:
    """The machine that the records name first: the whole run's, else a serve run's."""
    named = [record.get("machine") for record in (*found.of("demo"), *found.of("serve"))]
    return dict(next((machine for machine in named if machine), {}))


def _header(found: Measurements) -> Facts:
    """The model, the run and the machine: the run's own words first."""
    demo = found.first("demo") or {}
    serve = found.first("serve") or {}
    settings = demo.get("settings") or {}
    machine = _machine(found)
    facts: Facts = []
    for name in ("model", "command", "date", "commit"):
        value = demo.get(name) or settings.get(name) or machine.get(name)
        if value:
            facts.append((name, say(value)))

    def told(*keys: tuple[str, str]) -> list[str]:
        return [f"{serve[key]} {word}" for key, word in keys if serve.get(key) is not None]

    shape = told(("layers", "MoE layers"), ("num_experts", "experts"), ("top_k", "chosen"))
    if shape:
        facts.append(("shape", ", ".join(shape)))
    run = told(("prompts", "prompts"), ("max_new_tokens", "new tokens at most"))
    if (cold := serve.get("cold")) is not None:
        run.append("cache emptied before each prompt" if cold else "cache kept between prompts")
    if serve.get("store"):
        run.append(f"{serve['store']} store")
    if run:
        facts.append(("measured on", ", ".join(run)))
    if machine:
        facts.append(("machine", hardware(machine)))
    return facts


def _run(found: Measurements) -> dict[str, Facts]:
    """Time of each stage, settings of the run and of each training, versions."""
    demo = found.first("demo") or {}
    seconds = {
        label(name): f"{value:,.0f} s" if isinstance(value, int | float) else say(value)
        for name, value in (demo.get("seconds") or {}).items()
    }
    groups = {
        "Time per stage": [*seconds.items()],
        "Settings": flat(demo.get("settings") or {}),
    }
    for record in found.of("training"):
        groups[f"Training of {record['model']}"] = flat(record.get("settings") or {})
    groups["Versions"] = flat(demo.get("versions") or _machine(found).get("versions") or {})
    return {title: facts for title, facts in groups.items() if facts}


def assemble(found: Measurements) -> Report:
    """Arrange all that the records allow; what they lack is left out, with a note."""
    configurations = servings(found)
    first = configurations[0] if configurations else None
    sections, missing = [], []

    def add(section: Section, kind: str) -> None:
        if section.tables or section.figures or section.facts:
            sections.append(section)
        else:
            missing.append(f"{section.title}: no records of kind {kind!r}, so left out.")

    measured = benchmark_tables(found)
    # Without a comparison of models, the strategies that were run side by side are the first thing.
    compared = [main_table(found, c) for c in configurations]
    compared = compared or [table for table in measured if table.name == "bench"]
    add(Section("strategies", "Strategies", tables=compared), "serve")
    per_corpus = corpus_table(found)
    slots = first.slots if first else None
    for name, title, kind, drawn in (
        ("locality", "Locality", "locality", [locality(found), usage(found)]),
        ("cache", "Cache size and policy", "curve", [curves(found, slots), layers(found, first)]),
        ("quality", "Quality", "quality", [corpora(found, per_corpus)]),
        ("predictor", "Prediction", "predictor", [predictor(found)]),
        ("training", "Training", "training", [training(found)]),
    ):
        # Perplexity per corpus is a table in its own right; the others are numbers of a figure.
        shown: list[Table] = []
        if name == "quality":
            shown = [t for t in (per_corpus, score_table(found), comparison_table(found)) if t]
        add(Section(name, title, tables=shown, figures=[one for one in drawn if one]), kind)
    times = [make(c) for c in configurations for make in (time_table, transfer_table)]
    moments = [one for one in (timeline(found),) if one]
    add(Section("times", "Where the time goes", tables=times, figures=moments), "serve")
    if others := [table for table in measured if table not in compared]:
        sections.append(Section("benchmarks", "Benchmarks", tables=others))
    add(Section("run", "How it was run", facts=_run(found)), "demo")
    return Report(
        title="Melinoe: a Mixture-of-Experts model in a fraction of its memory"
        if found.of("serve")
        else "Melinoe: measurements",
        facts=_header(found),
        findings=findings(found, first) if first else [],
        sections=sections,
        limits=_limits(found),
        notes=missing + found.notes,
    )


def _limits(found: Measurements) -> list[str]:
    """Limits of the times and of the quality that a reader must know."""
    limits = []
    links = [record.get("link") for record in found.of("serve")]
    if any(link is None for link in links):
        limits.append(UNMODIFIED)
    if any(link is not None for link in links):
        limits.append(EMULATED)
    machine = _machine(found)
    if links and not any(machine.get(key) for key in ("gpu", "gpus", "cuda", "accelerator")):
        limits.append("No GPU took part: times are those of a CPU, counts hold on any machine.")
    if found.of("quality") and not found.of("score"):
        limits.append("Quality is perplexity alone here; no task was scored.")
    return limits


def findings(found: Measurements, serving: Serving) -> list[str]:
    """Say in sentences what the main table shows of the fine-tuned model against the others."""
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
    if (times := _times_fewer(base, tuned)) is None:
        return (
            "No change in expert transfers shown: per token "
            f"{inline(before)} base, {inline(after)} fine-tuned."
        )
    text = (
        f"The fine-tuned model needs {' '.join(times)} expert transfers per token than the base: "
        f"{inline(after)} instead of {inline(before)}"
    )
    # Any fine-tuning changes locality; only the step from the control is the locality terms' doing.
    middle = estimate(control, "transfers_per_token")
    if control is None or middle is None:
        return f"{text}."
    times = _times_fewer(control, tuned) or ("no change", "shown")
    return f"{text}; against the control, {inline(middle)}, {' '.join(times)}."


def _times_fewer(other: Record, tuned: Record) -> tuple[str, str] | None:
    """Times fewer or more transfers than another model's; None where no change is shown."""
    theirs, ours = (estimate(run, "transfers_per_token") for run in (other, tuned))
    assert theirs is not None and ours is not None
    fewer = ours.mean < theirs.mean
    times = quotient(*((other, tuned) if fewer else (tuned, other)), "transfers_per_token")
    if times is None or times.n < 2 or times.low <= 1:
        return None
    return f"{inline(times)} times", "fewer" if fewer else "more"


def _price(found: Measurements, has_control: bool) -> str | None:
    parts = []
    for in_domain, where in ((True, "in domain"), (False, "out of domain")):
        tuned = perplexity(found, "fine-tuned", in_domain)
        control = perplexity(found, "control", in_domain)
        if tuned is None or control is None:
            continue
        paired = increase_over_control(found, in_domain)
        unclear = "" if paired is not None or apart(tuned, control) else ", intervals overlap"
        amount = change(tuned, control) if paired is None else signed(paired)
        parts.append(
            f"{amount} {where} ({inline(tuned, digits=4)} against "
            f"{inline(control, digits=4)}{unclear})"
        )
    if not parts:
        return None if has_control else "No control was measured, so the price is not known."
    unlike = unlike_control(found)
    if unlike == []:
        return f"Its price in perplexity, over {about_control(unlike)}: {join(parts)}."
    return f"Its perplexity is {join(parts)}, over {about_control(unlike)}."


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
