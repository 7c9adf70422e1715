"""The model card as Markdown, every number from ``melinoe.json``."""

from collections.abc import Mapping
from typing import Any

from melinoe.report.card import paid, tables
from melinoe.report.card.verdict import verdict
from melinoe.report.facts import flat, hardware
from melinoe.report.render import markdown
from melinoe.report.render import plain as literal
from melinoe.report.tables import Cell, Table

UNKNOWN = "unknown"  # the hub's own word for a licence that nobody named
TAGS = ["mixture-of-experts", "moe", "expert-offloading", "melinoe"]

ABOUT = (
    "A Mixture-of-Experts model that runs from a few resident experts per layer waits for a "
    "transfer whenever a token needs an expert that is not there. "
)
# What it was trained for; what came of it is said by what was measured alone.
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
_LOCALITY_WEIGHTS = ("lambda_cache", "cache_prior", "lambda_reuse")
_HOLDING_WEIGHTS = ("lambda_distill", "lambda_match", "lambda_replay")


def front_matter(metadata: Mapping[str, Any], adapter: bool = False) -> dict[str, Any]:
    """What the hub reads at the top of a card; what is not known is left out."""
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
    found |= {"library_name": library, "pipeline_tag": "text-generation", "tags": TAGS}
    return found


def card_text(
    name: str, metadata: Mapping[str, Any], figures: Mapping[str, str], adapter: bool = False
) -> str:
    """
    Write the card's body.

    Args:
        name: The model's name.
        metadata: What `read_metadata` gave.
        figures: ``losses``, ``experts`` and ``hit_rates``, as far as there are, to file names.
        adapter: Whether it is of an adapter alone, which needs its base.
    """
    base, settings = metadata.get("base"), metadata.get("settings") or {}
    for_locality, purpose = _purpose(settings)
    if adapter and for_locality:
        purpose = ADAPTER
    price = metadata.get("price")
    parts = [f"# {literal(name)}"]
    origin = f" from {_named(base, metadata)}" if base else ""
    parts.append(f"Fine-tuned with Melinoe{origin}. {ABOUT}{purpose}")
    outcome = metadata.get("outcome")
    parts += ["## What fine-tuning changed"]
    if outcome is None:
        lines = paid.by_the_search(price)
        parts += ["\n".join(lines), "Nothing else was measured."] if lines else [UNMEASURED]
    else:
        asks = for_locality and not tables.has_control(outcome) and not (price or {}).get("paid")
        parts.append(verdict(outcome, settings, asks))
        lines = paid.sentences(outcome, settings, price)
        parts += ["\n".join(lines), paid.explained(outcome, settings, metadata, asks)]
        parts += tables.all_of(outcome, for_locality)
        models = "before, control and after" if tables.has_control(outcome) else "before and after"
        parts.append(
            f"![Distribution over prompts of the experts a completion uses, {models}]"
            f"({figures['experts']})"
        )
        parts.append(f"![Hit rate against slots per layer, {models}]({figures['hit_rates']})")
    parts += ["## How it was made", *_training(metadata)]
    if "losses" in figures:
        parts.append(f"![Loss terms over the steps of training]({figures['losses']})")
    parts += [
        "## Use",
        _use_adapter() if adapter else _use(outcome),
        "## Limits",
        _limits(metadata, outcome),
    ]
    return "\n\n".join(parts) + "\n"


def _purpose(settings: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether the model was trained for locality, and a sentence on what it was trained for."""

    def weight(name: str) -> float:
        return float(settings.get(name) or 0.0)

    if not settings or any(weight(name) for name in _LOCALITY_WEIGHTS):
        return True, FOR_LOCALITY
    anchor = weight("lambda_rank") if settings.get("anchor") != "none" else 0.0
    held = anchor or any(weight(name) for name in _HOLDING_WEIGHTS)
    return False, CONTROL if held else PLAIN


def _named(base: str, metadata: Mapping[str, Any]) -> str:
    model = metadata.get("base_model")
    if not model:
        return literal(base)
    commit = metadata.get("base_commit")
    link = f"https://huggingface.co/{model}" + (f"/tree/{commit}" if commit else "")
    return f"[{literal(base)}]({link})"


def _training(metadata: Mapping[str, Any]) -> list[str]:
    settings, data = metadata.get("settings") or {}, metadata.get("data") or {}
    facts = []
    if data.get("source"):
        facts.append(("data", data["source"] + (f", {data['split']}" if data.get("split") else "")))
    if data.get("examples"):
        facts.append(("examples", f"{data['examples']:,}"))
    if data.get("sha256"):
        facts.append((f"sha256 of the {data.get('sha256_of', 'file')}", data["sha256"]))
    steps = [row["step"] for row in metadata.get("log") or [] if "step" in row]
    if steps:
        facts.append(("steps", f"{max(steps):,}"))
    if metadata.get("skipped_steps"):
        facts.append(("steps skipped for a loss that was not finite", metadata["skipped_steps"]))
    if metadata.get("seconds") is not None:
        facts.append(("training time", f"{metadata['seconds']:,.0f} s"))
    facts += flat({key: value for key, value in settings.items() if key != "steps"})
    facts += [(f"{name} version", text) for name, text in flat(metadata.get("versions") or {})]
    rows = [[Cell(name), Cell(str(text))] for name, text in facts]
    if not rows:
        return ["Its `melinoe.json` does not say."]
    return [markdown(Table("training", "Training", ["setting", "value"], rows))]


def _use_adapter() -> str:
    return """\
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


def _use(outcome: Mapping[str, Any] | None) -> str:
    slots = "SLOTS" if outcome is None else outcome["slots"]
    return f"""\
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


def _limits(metadata: Mapping[str, Any], outcome: Mapping[str, Any] | None) -> str:
    lines = ["- The base model's limits are this model's too."]
    if outcome is not None:
        lines.append(
            f"- Measured on {outcome['prompts']} prompts with up to {outcome['max_new_tokens']} "
            "greedy tokens each; longer texts, sampling, batches and other domains may use more "
            "experts."
        )
        if not any(not v["in_domain"] for v in outcome["after"]["perplexity"].values()):
            lines.append("- What it lost on other kinds of text was not measured.")
        if outcome.get("machine"):
            lines.append(f"- Counts hold on any machine; measured on {_machine(outcome)}.")
    if not metadata.get("license"):
        lines.append(
            "- No licence is known: the base's card names none. Find out before you share this."
        )
    return "\n".join(lines)


def _machine(outcome: Mapping[str, Any]) -> str:
    return literal(hardware(outcome["machine"]))
