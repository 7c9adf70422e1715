"""One setting: a dataclass field with its default, its meaning and its unit."""

from collections.abc import Callable
from dataclasses import field, fields
from typing import Any


def setting(
    default: Any,
    help: str,
    *,
    unit: str | None = None,
    choices: tuple[str, ...] | Callable[[], tuple[str, ...]] | None = None,
) -> Any:
    """One dataclass field that carries its own documentation."""
    return field(default=default, metadata={"help": help, "unit": unit, "choices": choices})


def describe(settings: type) -> list[tuple[str, Any, str, str | None]]:
    """``(name, default, help, unit)`` for each field of a settings class, in order."""
    return [
        (one.name, one.default, one.metadata["help"], one.metadata["unit"])
        for one in fields(settings)
    ]


def check_choices(settings: Any, error: type[Exception]) -> None:
    """Raise *error* where a setting has none of the words it may have."""
    for one in fields(settings):
        choices, value = one.metadata["choices"], getattr(settings, one.name)
        choices = choices() if callable(choices) else choices
        if choices is not None and value not in choices:
            raise error(f"{one.name} cannot be {value!r}; choose one of {', '.join(choices)}")
