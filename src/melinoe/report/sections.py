"""A report's contents, in reading order and free of markup: what both twins are written from."""

from dataclasses import dataclass, field
from typing import Any

from melinoe.report import captions, glossary
from melinoe.report.amounts import label
from melinoe.report.benchmarks import benchmark_tables
from melinoe.report.facts import Facts, flat, hardware, say
from melinoe.report.figures.base import Figure
from melinoe.report.figures.corpora import corpora
from melinoe.report.figures.curves import curves
from melinoe.report.figures.layers import layers
from melinoe.report.figures.locality import locality
from melinoe.report.figures.losses import training
from melinoe.report.figures.predictor import predictor
from melinoe.report.figures.timeline import timeline
from melinoe.report.figures.usage import usage
from melinoe.report.records import Measurements
from melinoe.report.scores import comparison_table, score_table
from melinoe.report.study import frontier, study_tables
from melinoe.report.tables import (
    Table,
    corpus_table,
    main_table,
    servings,
    time_table,
    transfer_table,
)


@dataclass
class Section:
    """One part of a report."""

    name: str
    title: str
    text: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    facts: dict[str, Facts] = field(default_factory=dict)


@dataclass
class Report:
    """A whole report."""

    title: str
    facts: Facts
    findings: list[str]
    sections: list[Section]
    glossary: list[tuple[str, str]]
    limits: list[str]
    notes: list[str]


def _seconds(value: Any) -> str:
    return f"{value:,.0f} s" if isinstance(value, int | float) else say(value)


def _machine(found: Measurements) -> dict[str, Any]:
    """Give the machine that the records name first: the whole run's, else a serve run's."""
    named = [record.get("machine") for record in (*found.of("demo"), *found.of("serve"))]
    return dict(next((machine for machine in named if machine), {}))


def _header(found: Measurements) -> Facts:
    """Say what ran where: the run's own words first, then the model's shape."""
    demo = found.first("demo") or {}
    serve = found.first("serve") or {}
    settings = demo.get("settings") or {}
    machine = _machine(found)
    facts: Facts = []
    for name in ("model", "command", "date", "commit"):
        value = demo.get(name) or settings.get(name) or machine.get(name)
        if value:
            facts.append((name, say(value)))
    shape = [
        f"{serve[key]} {word}"
        for key, word in (("layers", "MoE layers"), ("num_experts", "experts"), ("top_k", "chosen"))
        if serve.get(key) is not None
    ]
    if shape:
        facts.append(("shape", ", ".join(shape)))
    run = [
        f"{serve[key]} {word}"
        for key, word in (("prompts", "prompts"), ("max_new_tokens", "new tokens at most"))
        if serve.get(key) is not None
    ]
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
    """Say what the run was set to, how long its stages took, and what trained each model."""
    demo = found.first("demo") or {}
    seconds = demo.get("seconds") or {}
    groups = {
        "Time per stage": [(label(name), _seconds(value)) for name, value in seconds.items()],
        "Settings": flat(demo.get("settings") or {}),
    }
    for record in found.of("training"):
        groups[f"Training of {record['model']}"] = flat(record.get("settings") or {})
    groups["Versions"] = flat(demo.get("versions") or _machine(found).get("versions") or {})
    return {title: facts for title, facts in groups.items() if facts}


def assemble(found: Measurements) -> Report:
    """Arrange everything that the records allow; what they lack is left out, with a note."""
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
    sections += _studies(found)
    times = [make(c) for c in configurations for make in (time_table, transfer_table)]
    moments = [one for one in (timeline(found),) if one]
    add(Section("times", "Where the time goes", tables=times, figures=moments), "serve")
    if others := [table for table in measured if table not in compared]:
        sections.append(Section("benchmarks", "Benchmarks", tables=others))
    add(Section("run", "How it was run", facts=_run(found)), "demo")
    return Report(
        title=_title(found),
        facts=_header(found),
        findings=captions.findings(found, first) if first else [],
        sections=sections,
        glossary=glossary.GLOSSARY,
        limits=_limits(found),
        notes=missing + found.notes,
    )


def _studies(found: Measurements) -> list[Section]:
    """One section per group of a study: its tables, and its frontier where it has one."""
    sections: list[Section] = []
    for table in study_tables(found):
        if table.name.endswith(("-texts", "-caches")):
            sections[-1].tables.append(table)
            continue
        figure = frontier(found, table.name.removeprefix("study-"))
        figures_shown = [figure] if figure else []
        sections.append(Section(table.name, table.title, tables=[table], figures=figures_shown))
    return sections


def _title(found: Measurements) -> str:
    if found.of("serve"):
        return "Melinoe: a Mixture-of-Experts model in a fraction of its memory"
    return "Melinoe: measurements"


def _limits(found: Measurements) -> list[str]:
    limits = []
    links = [record.get("link") for record in found.of("serve")]
    if any(link is None for link in links):
        limits.append(glossary.UNMODIFIED)
    if any(link is not None for link in links):
        limits.append(glossary.EMULATED)
    machine = _machine(found)
    if links and not any(machine.get(key) for key in ("gpu", "gpus", "cuda", "accelerator")):
        limits.append("No GPU took part: times are those of a CPU, counts hold on any machine.")
    if found.of("quality") and not found.of("score"):
        limits.append("Quality is perplexity alone here; no task was scored.")
    return limits
