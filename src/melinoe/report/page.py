"""Write a report: one HTML page that needs nothing else, its Markdown twin, figures as files."""

from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from melinoe.errors import DataError
from melinoe.report import figures
from melinoe.report.comparing import (
    about_control,
    differing_settings,
    increase,
    perplexity,
    quality,
    quotient,
)
from melinoe.report.figures import Figure
from melinoe.report.records import Measurements, Record, Sources, estimate, read_records
from melinoe.report.table import Table, flat, hardware, inline, join, literal, markdown
from melinoe.report.tables import (
    Serving,
    link_text,
    main_table,
    model_tables,
    predictor_table,
    servings,
    time_table,
    transfer_table,
)
from melinoe.whole_file import write_whole

HERE = Path(__file__).parent
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
NO_GPU = "No GPU took part: times are those of a CPU, counts hold on any machine."
NO_TASK = "Quality is perplexity alone here; no task was scored."

Part = str | Table | Figure  # Markdown, or what becomes some


def page_path(out: Path | str) -> Path:
    """Return a page's path; DataError, before minutes of replays, if it is not named as one."""
    path = Path(out)
    if path.suffix not in (".html", ".htm"):
        raise DataError(f"{path} is not the name of an HTML page; let it end in .html")
    return path


def write_report(sources: Sources, out: Path | str) -> None:
    """
    Write the report of some records as *out* (HTML) and beside it as Markdown (``.md``).

    The page makes no request: style and figures are inside. The same records give the same bytes.
    Each file appears whole or not at all. DataError: as `read_records`, or *out* cannot be written.
    """
    out = page_path(out)
    parts = assemble(read_records(sources))
    _write({out: html_page(parts), out.with_suffix(".md"): markdown_page(parts)}, out)


def figures_of(sources: Sources) -> list[Figure]:
    """Return the figures of the page that these records make, in the page's order."""
    return [part for part in assemble(read_records(sources)) if isinstance(part, Figure)]


def svg_files(drawn: Sequence[Figure]) -> dict[str, str]:
    """Return each panel as SVG by file name: the figure's, numbered where it has several."""
    return {
        f"{one.name}-{number}.svg" if len(one.panels) > 1 else f"{one.name}.svg": panel
        for one in drawn
        for number, panel in enumerate(one.panels, 1)
    }


def _write(texts: Mapping[Path, str], named: Path | str) -> None:
    try:
        for path, text in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, text)
    except OSError as error:
        message = f"cannot write {named} ({error.strerror}); name a place that can be written to"
        raise DataError(message) from error


def html_page(parts: Sequence[Part]) -> str:
    """Write a report as one HTML document, from the Markdown of its twin."""
    from markdown_it import MarkdownIt

    def drawing(figure: Figure) -> str:
        alt = escape(figure.caption)
        data = (b64encode(panel.encode()).decode() for panel in figure.panels)
        images = "".join(f'<img alt="{alt}" src="data:image/svg+xml;base64,{d}">' for d in data)
        return (
            f'<div class="panels">{images}</div>\n\n{literal(figure.caption)}\n\n'
            f"<details><summary>The numbers</summary>\n\n{markdown(figure.table)}\n\n</details>"
        )

    # What records say is escaped by `literal`; the tags are ours.
    reader = MarkdownIt("commonmark").enable("table")
    reader.disable(["image", "link", "autolink", "entity"])  # a page makes no request
    body = reader.render(_text(parts, drawing))
    style = (HERE / "style.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Melinoe: a report</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"{body}</body>\n</html>\n"
    )


def markdown_page(parts: Sequence[Part]) -> str:
    """Write a report as Markdown: the same words and numbers, figures as tables."""
    return _text(parts, lambda figure: f"{literal(figure.caption)}\n\n{markdown(figure.table)}")


def _text(parts: Sequence[Part], drawing: Callable[[Figure], str]) -> str:
    written = []
    for part in parts:
        if isinstance(part, str):
            written.append(part)
        else:
            shown = markdown(part) if isinstance(part, Table) else drawing(part)
            written.append(f"### {literal(part.title)}\n\n{shown}")
    return "\n\n".join(filter(None, written)) + "\n"


# --- what stands in a report ----------------------------------------------------------------------


def assemble(found: Measurements) -> list[Part]:
    """Arrange all that the records allow; what they lack is left out, with a note."""
    configurations = servings(found)
    first = configurations[0] if configurations else None
    compared = [main_table(found, c) for c in configurations]
    times = [make(c) for c in configurations for make in (time_table, transfer_table)]
    cache = [figures.curves(found, first.slots if first else None)]
    contents: list[tuple[str, str, Sequence[Part | None]]] = [
        ("Strategies", "serve", compared),
        ("Locality", "locality", [figures.locality(found)]),
        ("Cache size and policy", "curve", cache),
        ("Quality", "quality", model_tables(found)),
        ("Prediction", "predictor", [predictor_table(found)]),
        ("Where the time goes", "serve", times),
        ("How it was run", "demo", _run(found)),
    ]
    title = "a Mixture-of-Experts model in a fraction of its memory"
    parts: list[Part] = [f"# Melinoe: {title if first else 'measurements'}"]
    parts += [_bullets(findings(found, first)) if first else "", _header(found)]
    missing = []
    for title, kind, made in contents:
        if shown := [one for one in made if one is not None]:
            parts += [f"## {title}", *shown]
        else:
            missing.append(f"{title}: no records of kind {kind!r}, so left out.")
    glossary = (HERE / "glossary.md").read_text(encoding="utf-8").strip()
    remarks = _bullets(_limits(found) + missing + found.notes)
    return [*parts, "## How to read this", glossary, "## Limits and omissions", remarks]


def _bullets(texts: Sequence[str]) -> str:
    return "\n".join(f"- {literal(text)}" for text in texts)


def _machine(found: Measurements) -> dict[str, Any]:
    """Return the machine that the records name first: the whole run's, else a serve run's."""
    named = (record.get("machine") for record in (*found.of("demo"), *found.of("serve")))
    return dict(next(filter(None, named), {}))


def _header(found: Measurements) -> str:
    """Name the model's shape, what was run and the machine."""
    run = next(iter(found.of("serve")), {})
    words = {"layers": "MoE layers", "num_experts": "experts", "top_k": "chosen"}
    words |= {"prompts": "prompts", "max_new_tokens": "new tokens at most"}
    told = [f"{run[key]} {word}" for key, word in words.items() if run.get(key) is not None]
    return literal("; ".join(filter(None, [", ".join(told), hardware(_machine(found))])))


def _run(found: Measurements) -> list[str]:
    """List the time of each stage, settings of the run and of each training, versions."""
    demo = next(iter(found.of("demo")), {})
    groups = {"Seconds": demo.get("seconds"), "Settings": demo.get("settings")}
    groups |= {f"Training of {r['model']}": r.get("settings") for r in found.of("training")}
    groups["Versions"] = demo.get("versions") or _machine(found).get("versions")
    return [
        f"### {literal(name)}\n\n"
        + _bullets([f"{key}: {text}" for key, text in flat(facts).items()])
        for name, facts in groups.items()
        if facts
    ]


def _limits(found: Measurements) -> list[str]:
    """List the limits of the times and of the quality that a reader must know."""
    links = [record.get("link") for record in found.of("serve")]
    said = {
        UNMODIFIED: None in links,
        EMULATED: any(links),
        NO_GPU: bool(links) and not _machine(found).get("gpu"),
        NO_TASK: bool(found.of("quality")),
    }
    return [text for text, holds in said.items() if holds]


def findings(found: Measurements, serving: Serving) -> list[str]:
    """Say in sentences what the main table shows of the fine-tuned model against the others."""
    base, tuned, control = (serving.run(one) for one in ("base", "fine-tuned", "control"))
    if base is None or tuned is None:
        return []
    said = [_transfers(base, tuned, control), _price(found, control is not None)]
    for link in serving.links:
        fast, slow = (serving.runs[name].get(link) for name in ("fine-tuned", "base"))
        after, before = (estimate(run, "tokens_per_s") for run in (fast, slow))
        if before is not None and after is not None:
            times = quotient(fast, slow, "tokens_per_s")
            beside = f", {inline(times)} times the base's" if times is not None else ", base"
            said.append(
                f"Over the {link_text(link)} it writes {inline(after)} tokens a second{beside} "
                f"{inline(before)}."
            )
    return [text for text in said if text]


def _transfers(base: Record, tuned: Record, control: Record | None) -> str | None:
    before, after, middle = (estimate(run, "transfers_per_token") for run in (base, tuned, control))
    if before is None or after is None:
        return None
    if not (times := _times_fewer(base, tuned)):
        return (
            "No change in expert transfers shown: per token "
            f"{inline(before)} base, {inline(after)} fine-tuned."
        )
    text = (
        f"The fine-tuned model needs {times} expert transfers per token than the base: "
        f"{inline(after)} instead of {inline(before)}"
    )
    # Any fine-tuning changes locality; only the step from the control is the locality terms' doing.
    if control is None or middle is None:
        return f"{text}."
    times = _times_fewer(control, tuned) or "no change shown"
    return f"{text}; against the control, {inline(middle)}, {times}."


def _times_fewer(other: Record, tuned: Record) -> str:
    """Say how many times fewer or more transfers than another's; empty where none is shown."""
    for top, bottom, word in ((other, tuned, "fewer"), (tuned, other, "more")):
        times = quotient(top, bottom, "transfers_per_token")
        if times is not None and times.n > 1 and times.low > 1:
            return f"{inline(times)} times {word}"
    return ""


def _price(found: Measurements, has_control: bool) -> str | None:
    parts = []
    for in_domain, where in ((True, "in domain"), (False, "out of domain")):
        tuned, control = (perplexity(found, m, in_domain) for m in ("fine-tuned", "control"))
        if tuned is None or control is None:
            continue
        amount = increase(*(quality(found, m, in_domain) for m in ("fine-tuned", "control")))
        if not amount:  # the records do not list their sequences
            continue
        beside = f"{inline(tuned, digits=4)} against {inline(control, digits=4)}"
        parts.append(f"{amount} {where} ({beside})")
    if not parts:
        return None if has_control else "No control was measured, so the price is not known."
    differing = differing_settings(found)
    if differing == []:
        return f"Its price in perplexity, over {about_control(differing)}: {join(parts)}."
    return f"Its perplexity is {join(parts)}, over {about_control(differing)}."
