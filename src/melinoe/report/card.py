# ruff: noqa: RUF001  (signs such as × and − are meant: they are what a reader sees)
"""Write a fine-tuned checkpoint's model card from its ``melinoe.json``, and from nothing else."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from melinoe.checkpoint import read_metadata
from melinoe.checkpoint.metadata import read_card
from melinoe.config.likeness import differences, for_locality
from melinoe.errors import CheckpointError, OutputExistsError, WriteError
from melinoe.report.amounts import flat, hardware, inline, plain, signed
from melinoe.report.page import figures_of, svg_files
from melinoe.report.table import Cell, Table, cell, literal, markdown
from melinoe.stats import Estimate
from melinoe.whole_file import write_whole

CARD = "README.md"
END = "<!-- `melinoe card` writes what stands above this line, and keeps what stands below. -->"
UNKNOWN = "unknown"  # the hub's own word for a licence that nobody named
TAGS = ["mixture-of-experts", "moe", "expert-offloading", "melinoe"]
NO_CHANGE = "**No change shown**"

ABOUT = (
    "A Mixture-of-Experts model that runs from a few resident experts per layer waits for a "
    "transfer whenever a token needs an expert that is not resident. "
)
FOR_LOCALITY = (
    "This model was fine-tuned with the aim of fewer such transfers. Its architecture and its "
    "files are those of its base, so it runs wherever the base runs."
)
ADAPTER = (
    "This is an adapter in PEFT's files: what fine-tuning trained, with the aim of fewer such "
    "transfers. `melinoe merge` makes a checkpoint of it and its base that runs wherever the base "
    "runs."
)
PLAIN = (
    "This model was fine-tuned on next tokens alone: it shows what plain fine-tuning on the same "
    "data does."
)
CONTROL = (
    "This model was fine-tuned without locality terms, but with others that hold it near its base "
    "or a teacher: it shows what those do by themselves."
)
UNMEASURED = "Nothing was measured of this checkpoint."
NOT_PRICED = (
    "The changes are from the base model, so they contain what plain fine-tuning on the same data "
    "does by itself. `melinoe finetune` measures what the locality terms do with `--against "
    "control`, which trains one too, or with `--against DIR`, which takes one that `--control` "
    "wrote."
)
USE_ADAPTER = """\
As a checkpoint of the base's kind, for Melinoe and any other engine:

```
melinoe merge ADAPTER --base BASE --out MERGED
```

With PEFT, on the base:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("BASE"), "ADAPTER")
```"""
USE = """\
As any transformers model, all experts resident:

```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("PATH_OR_HUB_NAME")
```

From {slots} resident experts per layer:

```python
import melinoe
model, cache = melinoe.load("PATH_OR_HUB_NAME", slots={slots})
model.generate(...)
```"""
Json = Mapping[str, Any]


def write_card(directory: str | Path, overwrite: bool = False) -> list[Path]:
    """
    Write ``README.md`` and its figures from a checkpoint's ``melinoe.json``.

    The same ``melinoe.json`` gives the same files. What stands below the card's last line, and
    what a person put into its front matter, stays.

    Args:
        directory: The checkpoint.
        overwrite: Replace a ``README.md`` that this function did not write.

    Returns:
        The files written, the card first.

    Raises:
        CheckpointError: *directory* has no ``melinoe.json``, or a malformed one.
        OutputExistsError: it has another ``README.md``.
        WriteError: it cannot be written to.
    """
    path = Path(directory).expanduser()
    if not path.is_dir():
        raise CheckpointError(f"{path} is no directory; give a fine-tuned checkpoint's")
    metadata = read_metadata(path)
    if not metadata:
        raise CheckpointError(
            f"{path} has no melinoe.json to write a card from; give a checkpoint that "
            "`melinoe finetune` wrote"
        )
    card = path / CARD
    # One that is no UTF-8 was not written by us.
    before = card.read_text(encoding="utf-8", errors="replace") if card.exists() else ""
    if before and END not in before and not overwrite:
        raise OutputExistsError(
            f"{card} was not written by melinoe; keep it, or replace it with --overwrite"
        )
    _, _, below = before.partition(END)
    adapter = not (path / "config.json").is_file() and (path / "adapter_config.json").is_file()
    header, theirs = front_matter(metadata, adapter), read_card(path) if END in before else {}
    # What a person added to the front matter stays, and the licence that they found out.
    header |= {key: value for key, value in theirs.items() if key not in header}
    if header["license"] == UNKNOWN and theirs.get("license"):
        header["license"] = theirs["license"]
    licence = header["license"] if header["license"] != UNKNOWN else None
    drawings = svg_files(figures_of(sources)) if (sources := _records(metadata)) else {}
    pictures = {f"melinoe-{name}": text for name, text in drawings.items()}
    text = card_text(path.resolve().name, {**metadata, "license": licence}, pictures, adapter)
    try:
        for name, drawing in pictures.items():
            write_whole(path / name, drawing)
        write_whole(card, f"---\n{_yaml(header)}---\n\n{text}\n{END}\n{below.lstrip(chr(10))}")
    except OSError as error:
        raise WriteError(
            f"cannot write the card into {path} ({error.strerror}); make room, or make it writable"
        ) from None
    return [card, *(path / name for name in pictures)]


def front_matter(metadata: Json, adapter: bool = False) -> dict[str, Any]:
    """Return what the hub reads at the top of a card; what is not known is left out."""
    data = metadata.get("data") or {}
    found: dict[str, Any] = {"license": metadata.get("license") or UNKNOWN}
    if metadata.get("language"):
        found["language"] = metadata["language"]
    if metadata.get("base_model"):
        found["base_model"] = metadata["base_model"]
        found["base_model_relation"] = "adapter" if adapter else "finetune"
    if data.get("hub") and data.get("source"):
        found["datasets"] = [data["source"].partition(":")[0]]
    library = "peft" if adapter else "transformers"
    return found | {"library_name": library, "pipeline_tag": "text-generation", "tags": TAGS}


def _yaml(values: Json) -> str:
    import yaml

    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _records(metadata: Json) -> list[dict[str, Any]]:
    """The records of a report's figures: losses, experts of completions, hit rate by slots."""
    outcome = metadata.get("outcome") or {}
    log = [row for row in metadata.get("log") or [] if "step" in row]
    found: list[dict[str, Any]] = []
    if any(row.get(term) is not None for row in log for term in ("nll", "cache")):
        found.append({"kind": "training", "model": "fine-tuned", "log": log})
    for side, model in (("before", "base"), ("control", "control"), ("after", "fine-tuned")):
        if not outcome.get(side):
            continue
        wrote, total = outcome[side]["writing"], outcome["num_experts"]
        about = {"model": model, "num_experts": total}
        found.append({"kind": "locality", **about, **wrote})
        for policy, cache in wrote["caches"].items():
            found.append({"kind": "curve", "policy": policy, **about, **cache})
    return found


def card_text(
    name: str, metadata: Json, pictures: Sequence[str] | Json, adapter: bool = False
) -> str:
    """
    Write the card's body.

    Args:
        name: The model's name.
        metadata: What `read_metadata` gave.
        pictures: File names of the figures, each named after what it draws.
        adapter: Whether it is of an adapter alone, which needs its base.
    """

    def shown(of: str, about: str) -> list[str]:
        return [f"![{about}]({file})" for file in pictures if file.startswith(f"melinoe-{of}")]

    base, settings = metadata.get("base"), metadata.get("settings") or {}
    aims, purpose = _purpose(settings)
    if adapter and aims:
        purpose = ADAPTER
    outcome = metadata.get("outcome")
    origin = f" from {base_link(base, metadata)}" if base else ""
    parts = [f"# {literal(name)}", f"Fine-tuned with Melinoe{origin}. {ABOUT}{purpose}"]
    parts += ["## What fine-tuning changed"]
    if outcome is None:
        parts.append(UNMEASURED)
    else:
        control = has_control(outcome)
        asks = aims and not control
        parts.append(verdict(outcome, settings, asks))
        parts += [explained(outcome, settings, asks), *tables(outcome, aims)]
        models = "before, control and after" if control else "before and after"
        parts += shown(
            "locality", f"Distribution over prompts of the experts a completion uses, {models}"
        )
        parts += shown("curves", "Hit rate against slots per layer")
    parts += ["## How it was made", _training(metadata)]
    parts += shown("training", "Loss over the steps of training")
    slots = "SLOTS" if outcome is None else outcome["slots"]
    parts += ["## Use", USE_ADAPTER if adapter else USE.format(slots=slots)]
    parts += ["## Limits", _limits(metadata, outcome)]
    return "\n\n".join(parts) + "\n"


def _purpose(settings: Json) -> tuple[bool, str]:
    """Whether the model was trained for locality, and a sentence on what it was trained for."""

    def weighs(*names: str) -> bool:
        return any(float(settings.get(name) or 0.0) for name in names)

    if not settings or for_locality(settings):
        return True, FOR_LOCALITY
    held = weighs("lambda_distill", "lambda_match", "lambda_replay")
    held |= settings.get("anchor") != "none" and weighs("lambda_rank")
    return False, CONTROL if held else PLAIN


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


def unlike(outcome: Json, settings: Json) -> list[str] | None:
    """
    Name what sets the control apart beside the locality terms; empty if nothing does.

    ``None`` where the record does not say how the control was trained.
    """
    theirs = (outcome.get("control_run") or {}).get("settings")
    return None if theirs is None else [*differences(settings, theirs)]


def verdict(outcome: Json, settings: Json, asks: bool) -> str:
    """
    Say what was measured of the aim: transfers and perplexity against the control, or the base.

    Args:
        outcome: Of a ``melinoe.json``.
        settings: Those of the run.
        asks: Whether there were locality terms whose price is not known.
    """
    other, name, change, priced = "its base", "the base", outcome["change"], False
    if has_control(outcome):
        name, change = "the control", outcome["change_from_control"]
        names = unlike(outcome, settings)
        priced = names == []
        if names is None:
            other = "a control of which the record does not say how it was trained"
        elif names:
            other = (
                f"a control that is not like for like (it differs in {literal(', '.join(names))}, "
                "so that no difference is the locality terms' alone)"
            )
        else:
            other = "its control, the same training without the locality terms"
    slots, policies = outcome["slots"], change["reading"]["transfers_per_token"]
    policy = "lfu" if "lfu" in policies else next(iter(policies))
    by_size = dict(zip(policies[policy]["slots"], policies[policy]["ratio"], strict=True))
    where = (
        f"{slots} of {outcome['num_experts']} experts per layer resident, {policy.upper()}, "
        "reading the same held-out text"
    )
    said = _transfers(by_size.get(slots), other, name, where)
    own: list[str] = []
    others: list[str] = []
    for domain, value in change["perplexity"].items():
        inside = outcome["after"]["perplexity"][domain]["in_domain"]
        (own if inside else others).append(_changed(domain, _estimate(value), inside and priced))
    said += "".join(f"; {one}" for one in own) + "."
    if others:
        beside = "Price out of domain" if priced else "Perplexity out of domain"
        said += f" {beside}, against {name}: {'; '.join(others)}."
    return said + (" What the locality terms saved and cost was not measured." if asks else "")


def _transfers(value: Json | None, other: str, name: str, where: str) -> str:
    """A sentence without its end: the model's transfers against another's."""
    if value is None:
        return f"Against {other}, this model needs **no transfers** ({where})"
    ratio = _estimate(value)
    told = f"the transfers per token of {name} over this model's are {inline(ratio)} ({where})"
    if ratio.n < 2:
        return f"{NO_CHANGE} against {other}: {told}, on one prompt, which says nothing of the next"
    if ratio.low <= 1 <= ratio.high:
        return f"{NO_CHANGE} against {other}: {told}, and the interval contains 1"
    if ratio.mean < 1:
        return f"Against {other}, this model needs **more** transfers: {told}"
    return (
        f"Against {other}, this model needs **{inline(ratio)} times fewer** transfers per token "
        f"({where})"
    )


def _changed(domain: str, change: Estimate, priced: bool) -> str:
    """Say what became of perplexity on one text."""
    text = f"perplexity on held-out {literal(domain)}"
    if doubt := _doubt(change):
        return f"{text} {signed(change)}{doubt}"
    if change.mean > 0 and priced:
        return f"at a price of **{signed(change)}** in {text}"
    return f"{text} **{signed(change)}**"


def _doubt(change: Estimate) -> str:
    """Say why an interval shows no change; empty if it does."""
    if change.n < 2:
        return ", on one text, which says nothing of the next"
    return ", where the interval contains 0" if change.low <= 0 <= change.high else ""


def _estimate(value: Json) -> Estimate:
    return Estimate.from_dict(dict(value))


def explained(outcome: Json, settings: Json, asks: bool) -> str:
    """
    Say how the figures came about, and what they leave open.

    Args:
        outcome: Of a ``melinoe.json``.
        settings: Those of the run.
        asks: Whether there were locality terms whose price is not known.
    """
    control = has_control(outcome)
    said = (
        f"{'All three' if control else 'Both'} models got the same held-out prompts and texts; "
        "changes are paired, intervals are 95 % bootstraps over prompts or texts. Hit rates and "
        "transfers are of completion tokens, counted by replaying what each model chose, the cache "
        "emptied before each prompt."
    )
    if control and unlike(outcome, settings) == []:
        said += (
            " The control was fine-tuned from the same base on the same data, in the same order, "
            "with the same steps, seed, teacher and replayed text, without the locality terms "
            "alone: what differs from it is their doing."
        )
    return said + (f" {NOT_PRICED}" if asks else "")


def tables(outcome: Json, aims: bool) -> list[str]:
    """
    Write the tables of perplexity, of locality while writing and of locality while reading.

    Args:
        outcome: Of a ``melinoe.json``.
        aims: Whether the model was trained for locality, with the slots that are named.
    """
    sides, changes = [outcome["before"], outcome["after"]], [outcome["change"]]
    heads = ["before", "after", "change"]
    if has_control(outcome):
        sides.insert(1, outcome["control"])
        changes.append(outcome["change_from_control"])
        heads = ["before", "control", "after", "from before", "from control"]
    rows = []
    for domain, value in outcome["after"]["perplexity"].items():
        where = "in domain" if value["in_domain"] else "out of domain"
        found = [_estimate(side["perplexity"][domain]["perplexity"]) for side in sides]
        changed = [Cell(signed(_estimate(one["perplexity"][domain]))) for one in changes]
        name = Cell(f"{domain} ({where})")
        rows.append([name, *(cell(one, digits=4) for one in found), *changed])
    quality = Table("quality", "Perplexity", ["perplexity", *heads], rows)
    writing, reading = (
        Table(name, "Locality", [name, *heads], [*_locality(outcome, sides, changes, name)])
        for name in ("writing", "reading")
    )
    if aims:
        trained = f"{outcome['slots']} slots"
        for row in (*writing.rows, *reading.rows):
            if row[0].text.endswith(f" {trained}"):
                row[0] = Cell(f"{row[0].text} (trained for)")
    return [
        markdown(quality),
        "What each model chose while it wrote its own greedy completions:",
        markdown(writing),
        "And while it read the held-out completions, the same tokens for all, so that a model that "
        "repeats itself gains nothing by it:",
        markdown(reading),
    ]


def _locality(
    outcome: Json, sides: Sequence[Json], changes: Sequence[Json], doing: str
) -> Iterator[list[Cell]]:
    """Rows of each model's locality while it wrote or read, and the changes where there are any."""
    sides, changes = [side[doing] for side in sides], [one[doing] for one in changes]
    nothing, total = [Cell("")] * len(changes), outcome["num_experts"]
    means = [cell(_estimate(side["experts_per_sequence_mean"])) for side in sides]
    fewer = [inline(_estimate(one["experts_per_sequence"])).replace("-", "−") for one in changes]
    yield [Cell("experts per sequence, mean layer"), *means, *map(Cell, fewer)]
    reuse = [cell(_estimate(side["reuse"]), "%") for side in sides]
    yield [Cell("experts reused from the token before"), *reuse, *nothing]
    whole = [Cell(f"{plain(side['distinct_experts'])} of {total}") for side in sides]
    yield [Cell("experts used over all prompts, mean layer"), *whole, *nothing]
    for policy, found in changes[0]["transfers_per_token"].items():
        caches = [side["caches"][policy] for side in sides]
        for at, size in enumerate(found["slots"]):
            moved, hits = (
                [cell(_estimate(c[key][c["slots"].index(size)]), unit) for c in caches]
                for key, unit in (("transfers_per_token", ""), ("hit_rate", "%"))
            )
            # Both changes leave out the same sizes: those at which the tuned model loads nothing.
            ratios = [one["transfers_per_token"][policy]["ratio"][at] for one in changes]
            times = [Cell(f"÷ {inline(_estimate(ratio))}") for ratio in ratios]
            yield [Cell(f"transfers per token, {policy.upper()}, {size} slots"), *moved, *times]
            yield [Cell(f"hit rate, {policy.upper()}, {size} slots"), *hits, *nothing]


def _training(metadata: Json) -> str:
    """The table of data, settings and versions."""
    settings, data = metadata.get("settings") or {}, metadata.get("data") or {}
    steps = [row["step"] for row in metadata.get("log") or [] if "step" in row]
    seconds, skipped = metadata.get("seconds"), metadata.get("skipped_steps")
    split = f", {data['split']}" if data.get("split") else ""
    facts = {
        "data": f"{data['source']}{split}" if data.get("source") else None,
        "examples": f"{data['examples']:,}" if data.get("examples") else None,
        f"sha256 of the {data.get('sha256_of', 'file')}": data.get("sha256"),
        "steps": f"{max(steps):,}" if steps else None,
        "steps skipped for a loss that was not finite": skipped or None,
        "training time": None if seconds is None else f"{seconds:,.0f} s",
        **dict(flat({key: value for key, value in settings.items() if key != "steps"})),
        **{f"{name} version": text for name, text in flat(metadata.get("versions") or {})},
    }
    rows = [[Cell(name), Cell(str(text))] for name, text in facts.items() if text is not None]
    if not rows:
        return "Its `melinoe.json` does not say."
    return markdown(Table("training", "Training", ["setting", "value"], rows))


def _limits(metadata: Json, outcome: Json | None) -> str:
    lines = ["- The base model's limits are this model's too."]
    if outcome is not None:
        lines.append(
            f"- Measured on {outcome['prompts']} prompts with up to {outcome['max_new_tokens']} "
            "greedy tokens each; longer texts, sampling, batches and other domains may use more "
            "experts."
        )
        if all(one["in_domain"] for one in outcome["after"]["perplexity"].values()):
            lines.append("- What it lost on other kinds of text was not measured.")
        if outcome.get("machine"):
            machine = literal(hardware(outcome["machine"]))
            lines.append(f"- Counts hold on any machine; measured on {machine}.")
    if not metadata.get("license"):
        lines.append(
            "- No licence is known: the base's card names none. Find out before you share this."
        )
    return "\n".join(lines)
