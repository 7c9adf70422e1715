# ruff: noqa: RUF001  (signs such as × and − are meant: they are what a reader sees)
"""Write a fine-tuned checkpoint's model card from its ``melinoe.json``, and from nothing else."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from melinoe.checkpoint import read_metadata
from melinoe.checkpoint.metadata import read_card
from melinoe.config.likeness import differences, for_locality
from melinoe.errors import CheckpointError, OutputExistsError, WriteError
from melinoe.report.comparing import about_control
from melinoe.report.page import figures_of, svg_files
from melinoe.report.table import (
    Cell,
    Table,
    cell,
    flat,
    hardware,
    inline,
    literal,
    markdown,
    plain,
    signed,
)
from melinoe.stats import Estimate
from melinoe.whole_file import write_whole

END = "<!-- `melinoe card` writes what stands above this line, and keeps what stands below. -->"
UNKNOWN = "unknown"  # the hub's own word for a licence that nobody named
NO_CHANGE = "**No change shown**"

Json = Mapping[str, Any]


def write_card(directory: str | Path, overwrite: bool = False) -> list[Path]:
    """
    Write ``README.md`` and its figures from a checkpoint's ``melinoe.json``; the card comes first.

    The same ``melinoe.json`` gives the same files. What stands below the card's last line, and
    what a person put into its front matter, stays. CheckpointError: no ``melinoe.json``, or a
    malformed one. OutputExistsError: a ``README.md`` of others, and not *overwrite*. WriteError.
    """
    import yaml

    path = Path(directory).expanduser()
    if not path.is_dir():
        raise CheckpointError(f"{path} is no directory; give a fine-tuned checkpoint's")
    metadata = read_metadata(path)
    if not metadata:
        raise CheckpointError(
            f"{path} has no melinoe.json to write a card from; give a checkpoint that "
            "`melinoe finetune` wrote"
        )
    card = path / "README.md"
    # One that is no UTF-8 was not written by us.
    before = card.read_text(encoding="utf-8", errors="replace") if card.exists() else ""
    if before and END not in before and not overwrite:
        raise OutputExistsError(
            f"{card} was not written by melinoe; keep it, or replace it with --overwrite"
        )
    adapter = not (path / "config.json").is_file() and (path / "adapter_config.json").is_file()
    # What a person added to the front matter stays, and the licence that they found out.
    header, theirs = _front_matter(metadata, adapter), read_card(path) if END in before else {}
    header = {**theirs, **header}
    if header["license"] == UNKNOWN and theirs.get("license"):
        header["license"] = theirs["license"]
    licence = header["license"] if header["license"] != UNKNOWN else None
    drawings = svg_files(figures_of(sources)) if (sources := _records(metadata)) else {}
    pictures = {f"melinoe-{name}": text for name, text in drawings.items()}
    body = _body(path.resolve().name, {**metadata, "license": licence}, [*pictures], adapter)
    front = yaml.safe_dump(header, sort_keys=False, allow_unicode=True)
    below = before.partition(END)[2].lstrip("\n")
    try:
        for name, drawing in pictures.items():
            write_whole(path / name, drawing)
        write_whole(card, f"---\n{front}---\n\n{body}\n\n{END}\n{below}")
    except OSError as error:
        raise WriteError(
            f"cannot write the card into {path} ({error.strerror}); make room, or make it writable"
        ) from None
    return [card, *(path / name for name in pictures)]


def _front_matter(metadata: Json, adapter: bool) -> dict[str, Any]:
    """Return what the hub reads at the top of a card; what is not known is left out."""
    data, base = metadata.get("data") or {}, metadata.get("base_model")
    hub = data.get("hub") and data.get("source")
    found = {
        "license": metadata.get("license") or UNKNOWN,
        "language": metadata.get("language"),
        "base_model": base,
        "base_model_relation": base and ("adapter" if adapter else "finetune"),
        "datasets": [data["source"].partition(":")[0]] if hub else None,
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mixture-of-experts", "moe", "expert-offloading", "melinoe"],
    }
    return {name: value for name, value in found.items() if value}


def _records(metadata: Json) -> list[dict[str, Any]]:
    """Make the records of a report's figures: experts of completions, hit rates."""
    outcome = metadata.get("outcome") or {}
    found: list[dict[str, Any]] = []
    for side, model in (("before", "base"), ("control", "control"), ("after", "fine-tuned")):
        if not outcome.get(side):
            continue
        wrote, about = outcome[side]["writing"], {"model": model}
        about["num_experts"] = outcome["num_experts"]
        found.append({"kind": "locality", **about, **wrote})
        for policy, cache in wrote["caches"].items():
            found.append({"kind": "curve", "policy": policy, **about, **cache})
    return found


def _body(name: str, metadata: Json, pictures: Sequence[str], adapter: bool) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    base, settings = metadata.get("base"), metadata.get("settings") or {}
    purpose, outcome = _purpose(settings), metadata.get("outcome") or {}
    control = has_control(outcome)
    about: dict[str, Any] = {"slots": "SLOTS"}
    if outcome:
        quality, writing, reading = _tables(outcome, purpose == "locality")
        about = {"slots": outcome["slots"], "verdict": verdict(outcome, settings)}
        about |= {"quality": quality, "writing": writing, "reading": reading}
        about["elsewhere"] = not all(
            o["in_domain"] for o in outcome["after"]["perplexity"].values()
        )
        about["machine"] = literal(hardware(outcome.get("machine") or {}))
    about |= {"name": literal(name), "base": base and base_link(base, metadata)}
    about |= {"adapter": adapter, "purpose": purpose, "control": control, "outcome": outcome}
    about |= {"like_for_like": control and _differing(outcome, settings) == []}
    about |= {"asks": purpose == "locality" and not control, "training": _training(metadata)}
    how: dict[str, Any] = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    template = Environment(loader=PackageLoader("melinoe.report", ""), **how).get_template(
        "card.md"
    )
    return template.render(about, pictures=pictures, licence=metadata.get("license"))


def _purpose(settings: Json) -> str:
    """Name what a run was for, by its settings: locality, or what its control or a plain run is."""
    if not settings or for_locality(settings):
        return "locality"
    return "control" if settings.get("lambda_replay") or settings.get("lambda_rank") else "plain"


def base_link(base: str, metadata: Json) -> str:
    """Link the base on the hub, at its commit; its bare name where it is not from the hub."""
    model, commit = metadata.get("base_model"), metadata.get("base_commit")
    if not model:
        return literal(base)
    link = f"https://huggingface.co/{model}" + (f"/tree/{commit}" if commit else "")
    return f"[{literal(base)}]({link})"


def has_control(outcome: Json) -> bool:
    """Return whether the control was measured beside base and result."""
    return bool(outcome.get("control") and outcome.get("change_from_control"))


def _differing(outcome: Json, settings: Json) -> list[str] | None:
    """Name what sets the control apart beside the locality terms; None where it is not said."""
    theirs = (outcome.get("control_run") or {}).get("settings")
    return None if theirs is None else [*differences(settings, theirs)]


def verdict(outcome: Json, settings: Json) -> str:
    """Say what was measured: transfers and perplexity against the control, or the base."""
    other, name, change, priced = "its base", "the base", outcome["change"], False
    if has_control(outcome):
        name, change = "the control", outcome["change_from_control"]
        names = _differing(outcome, settings)
        priced = names == []
        other = literal(about_control(names, "its"))
    slots, policies = outcome["slots"], change["reading"]["transfers_per_token"]
    policy = "lfu" if "lfu" in policies else next(iter(policies))
    by_size = dict(zip(policies[policy]["slots"], policies[policy]["ratio"], strict=True))
    where = (
        f"{slots} of {outcome['num_experts']} experts per layer resident, {policy.upper()}, "
        "reading the same held-out text"
    )
    said = _transfers(by_size.get(slots), other, name, where)
    own: dict[bool, list[str]] = {True: [], False: []}
    for domain, value in change["perplexity"].items():
        inside = outcome["after"]["perplexity"][domain]["in_domain"]
        own[inside].append(_changed(domain, value, inside and priced))
    said, others = f"{'; '.join([said, *own[True]])}.", own[False]
    if others:
        beside = "Price out of domain" if priced else "Perplexity out of domain"
        said += f" {beside}, against {name}: {'; '.join(others)}."
    return said


def _transfers(value: Json | None, other: str, name: str, where: str) -> str:
    """Begin the sentence on a model's transfers against another's."""
    if value is None:
        return f"Against {other}, this model needs **no transfers** ({where})"
    ratio = Estimate.from_dict(value)
    told = f"the transfers per token of {name} over this model's are {inline(ratio)} ({where})"
    if ratio.n < 2:
        return f"{NO_CHANGE} against {other}: {told}, on one prompt, which says nothing of the next"
    if ratio.low <= 1 <= ratio.high:
        return f"{NO_CHANGE} against {other}: {told}, and the interval contains 1"
    if ratio.mean < 1:
        return f"Against {other}, this model needs **more** transfers: {told}"
    times = f"**{inline(ratio)} times fewer** transfers per token ({where})"
    return f"Against {other}, this model needs {times}"


def _changed(domain: str, value: Json, priced: bool) -> str:
    """Say what became of perplexity on one text."""
    change, text = Estimate.from_dict(value), f"perplexity on held-out {literal(domain)}"
    if change.n < 2:
        return f"{text} {signed(change)}, on one text, which says nothing of the next"
    if change.low <= 0 <= change.high:
        return f"{text} {signed(change)}, where the interval contains 0"
    if change.mean > 0 and priced:
        return f"at a price of **{signed(change)}** in {text}"
    return f"{text} **{signed(change)}**"


def _tables(outcome: Json, aims: bool) -> list[str]:
    """Write the tables of perplexity, of locality while writing and of locality while reading."""
    sides, changes = [outcome["before"], outcome["after"]], [outcome["change"]]
    heads = ["before", "after", "change"]
    if has_control(outcome):
        sides.insert(1, outcome["control"])
        changes.append(outcome["change_from_control"])
        heads = ["before", "control", "after", "from before", "from control"]
    rows = []
    for domain, value in outcome["after"]["perplexity"].items():
        where = "in domain" if value["in_domain"] else "out of domain"
        found = (Estimate.from_dict(side["perplexity"][domain]["perplexity"]) for side in sides)
        changed = (Cell(signed(Estimate.from_dict(one["perplexity"][domain]))) for one in changes)
        shown = (cell(one, digits=4) for one in found)
        rows.append([Cell(f"{domain} ({where})"), *shown, *changed])
    trained = f" {outcome['slots']} slots" if aims else None
    written = [markdown(Table("", "", ["perplexity", *heads], rows))]
    for doing in ("writing", "reading"):
        rows = [
            [Cell(f"{name} (trained for)" if trained and name.endswith(trained) else name), *cells]
            for name, *cells in _locality(outcome["num_experts"], sides, changes, doing)
        ]
        written.append(markdown(Table("", "", [doing, *heads], rows)))
    return written


def _locality(
    total: int, sides: Sequence[Json], changes: Sequence[Json], doing: str
) -> Iterator[list[Any]]:
    """Yield rows, a name and cells: each model's locality while it wrote or read, and changes."""
    sides, changes = [side[doing] for side in sides], [one[doing] for one in changes]
    nothing = [Cell("")] * len(changes)
    means = [cell(Estimate.from_dict(side["experts_per_sequence_mean"])) for side in sides]
    fewer = [
        inline(Estimate.from_dict(one["experts_per_sequence"])).replace("-", "−") for one in changes
    ]
    yield ["experts per sequence, mean layer", *means, *map(Cell, fewer)]
    reuse = [cell(Estimate.from_dict(side["reuse"]), "%") for side in sides]
    yield ["experts reused from the token before", *reuse, *nothing]
    whole = [Cell(f"{plain(side['distinct_experts'])} of {total}") for side in sides]
    yield ["experts used over all prompts, mean layer", *whole, *nothing]
    for policy, found in changes[0]["transfers_per_token"].items():
        caches = [side["caches"][policy] for side in sides]
        for at, size in enumerate(found["slots"]):
            moved, hits = (
                [cell(Estimate.from_dict(c[key][c["slots"].index(size)]), unit) for c in caches]
                for key, unit in (("transfers_per_token", ""), ("hit_rate", "%"))
            )
            # Both changes leave out the same sizes: those at which the tuned model loads nothing.
            ratios = [one["transfers_per_token"][policy]["ratio"][at] for one in changes]
            times = [Cell(f"÷ {inline(Estimate.from_dict(ratio))}") for ratio in ratios]
            yield [f"transfers per token, {policy.upper()}, {size} slots", *moved, *times]
            yield [f"hit rate, {policy.upper()}, {size} slots", *hits, *nothing]


def _training(metadata: Json) -> str:
    """Write the table of data, settings and versions."""
    settings, data = metadata.get("settings") or {}, metadata.get("data") or {}
    steps = [row["step"] for row in metadata.get("log") or [] if "step" in row]
    seconds, split = metadata.get("seconds"), f", {data['split']}" if data.get("split") else ""
    facts = {
        "data": f"{data['source']}{split}" if data.get("source") else None,
        "examples": f"{data['examples']:,}" if data.get("examples") else None,
        f"sha256 of the {data.get('sha256_of', 'file')}": data.get("sha256"),
        "steps": f"{max(steps):,}" if steps else None,
        "steps skipped for a loss that was not finite": metadata.get("skipped_steps") or None,
        "training time": None if seconds is None else f"{seconds:,.0f} s",
        **flat({key: value for key, value in settings.items() if key != "steps"}),
        **flat({f"{name} version": of for name, of in (metadata.get("versions") or {}).items()}),
    }
    rows = [[Cell(name), Cell(str(text))] for name, text in facts.items() if text is not None]
    return markdown(Table("", "", ["setting", "value"], rows)) if rows else ""
