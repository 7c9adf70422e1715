"""Settings, machines and versions as names and texts for people."""

from collections.abc import Mapping
from typing import Any

from melinoe.report.amounts import label

Facts = list[tuple[str, str]]

# Said elsewhere in the header, or too long for a line about hardware.
NOT_HARDWARE = frozenset({"versions", "commit", "date"})


def say(value: Any) -> str:
    """Write a setting: ``none``, ``yes``, four significant digits, or as it is."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def flat(values: Mapping[str, Any], prefix: str = "") -> Facts:
    """Write a mapping as name and text, nested names joined: ``link bandwidth (GB/s)``."""
    facts: Facts = []
    for key, value in values.items():
        name = f"{prefix}{label(key)}"
        if isinstance(value, Mapping):
            facts += flat(value, f"{name} ")
        elif isinstance(value, list | tuple):
            facts.append((name, ", ".join(say(item) for item in value)))
        else:
            facts.append((name, say(value)))
    return facts


def hardware(machine: Mapping[str, Any]) -> str:
    """Write a machine on one line, leaving out what it does not have."""
    parts = {key: item for key, item in machine.items() if key not in NOT_HARDWARE}
    said = [f"{name}: {text}" for name, text in flat(parts) if text not in ("none", "")]
    return "; ".join(said)
