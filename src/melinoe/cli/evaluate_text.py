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
            # All resamples are alike where all or none are right: the bootstrap has no width.
            most = 1 - 0.05 ** (1 / n)  # of errors or successes, none of which was seen
            if right == 0:
                line += f"; the rate is below {most:.1%} (95 %)"
            elif right == n:
                line += f"; the rate is above {1 - most:.1%} (95 %)"
            lines.append(line)
    return lines
