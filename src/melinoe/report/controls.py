"""Say what kind of control the records hold: only one that is like for like sets a price."""

from melinoe.config.likeness import differences
from melinoe.report.records import Measurements


def about_control(found: Measurements) -> str:
    """Describe the control by its training beside the fine-tuned model's."""
    names = _unlike(found)
    if names is None:
        return "a control of which the records do not say how it was trained"
    if names:
        return (
            f"a control that is not like for like (it differs in {', '.join(names)} too, so that "
            "no difference is the locality terms' alone)"
        )
    return "the control, the same training without the locality terms"


def is_priced(found: Measurements) -> bool:
    """Whether the step from the control to the fine-tuned model is a price."""
    return _unlike(found) == []


def reference(found: Measurements, model: str) -> str | None:
    """
    Name the model that a model's perplexity is held against; ``None`` for the base.

    The fine-tuned model is held against the control where there is one: the base never saw the text
    that both trained on, so that any fine-tuning on it is better there.
    """
    measured = {record["model"] for record in found.of("quality")}
    if model == "base":
        return None
    return "control" if model == "fine-tuned" and "control" in measured else "base"


def note(found: Measurements) -> str:
    """Say what changes of perplexity in a table are from."""
    if not {"control", "fine-tuned"} <= {record["model"] for record in found.of("quality")}:
        return "Changes of perplexity are from base."
    return (
        "Changes of perplexity: the control's from base, the fine-tuned model's from "
        f"{about_control(found)}."
    )


def _unlike(found: Measurements) -> list[str] | None:
    settings = {r["model"]: r["settings"] for r in found.of("training") if r.get("settings")}
    if not {"control", "fine-tuned"} <= settings.keys():
        return None
    return [*differences(settings["fine-tuned"], settings["control"])]
