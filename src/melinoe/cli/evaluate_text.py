"""What `melinoe evaluate` shows people: a row per estimate, and what intervals do not say."""

from typing import Any


def rows(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table for people: one row per estimate."""
    found = []

    def add(record: dict[str, Any], measure: str, value: dict[str, Any]) -> None:
        about = {"model": record["model"], "text": record.get("domain", "completions")}
        found.append({**about, "measure": measure, **value})

    for record in records:
        kind = record["kind"]
        if kind == "quality":
            add(record, "perplexity", record["perplexity"])
            for model, rate in record.get("transfers", {}).items():
                add({**record, "model": model}, record["transfers_metric"], rate)
        elif kind == "score":
            add(record, record["metric"].replace("_", " "), record["score"])
        elif kind == "locality":
            add(record, "experts per sequence", record["experts_per_sequence_mean"])
            add(record, "reuse", record["reuse"])
        elif kind == "curve":
            for size, value in zip(record["slots"], record["transfers_per_token"], strict=True):
                policy = record["policy"].upper()
                add(record, f"transfers per token, {policy}, {size} slots", value)
    return found


def remarks(records: list[dict[str, Any]]) -> list[str]:
    """What an interval over examples does not say."""
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
            if right == 0:  # all resamples are alike, so the bootstrap's interval has no width
                line += f"; by the rule of three the rate is below {3 / n:.1%} (95 %)"
            lines.append(line)
    return lines
