"""One setting: a dataclass field with its default, its meaning and its unit."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, fields
from typing import Any


def setting(
    default: Any,
    help: str,
    *,
    unit: str | None = None,
    choices: tuple[str, ...] | Callable[[], tuple[str, ...]] | None = None,
) -> Any:
    """Make a field that documents itself; ``; absent: ...`` in *help* says what None means."""
    return field(default=default, metadata={"help": help, "unit": unit, "choices": choices})


def check_settings(
    settings: Any, within: Mapping[str, Sequence[str]], error: type[Exception]
) -> None:
    """
    Raise *error* where a setting has none of its words, or is outside its interval.

    *within*: interval, as ``(0, inf)``, to names of settings; one that is None is in each.
    """
    for one in fields(settings):
        choices, value = one.metadata["choices"], getattr(settings, one.name)
        choices = choices() if callable(choices) else choices
        if choices is not None and value not in choices:
            raise error(f"{one.name} cannot be {value!r}; choose one of {', '.join(choices)}")
    for interval, names in within.items():
        low, high = interval[1:-1].split(", ")
        words = f"in {interval}"
        if high == "inf":
            words = f"{low} or more" if interval[0] == "[" else f"above {low}"
        for name in names:
            if (value := getattr(settings, name)) is None:
                continue
            above = value >= float(low) if interval[0] == "[" else value > float(low)
            below = value <= float(high) if interval[-1] == "]" else value < float(high)
            if not (above and below):
                raise error(f"{name} cannot be {value}; it must be {words}")
