"""
Options of a command, made from a settings class: each setting once, in `melinoe.config`.

Typer reads a command from its signature, so a signature is what is made here. The help is printed
in panels, for a command with many options.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, fields
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand


class PanelCommand(TyperCommand):
    """A command whose help shows the options in the panels they were given."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help with rich, which only this command's help needs."""
        from typer import rich_utils

        rich_utils.rich_format_help(obj=self, ctx=ctx, markup_mode="rich")


def with_settings(
    settings: type, panels: Mapping[str, Sequence[str]]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """
    Give a command one option for each field of a settings class.

    The command takes ``given``: a dictionary from names to values, for the class.

    Args:
        settings: A dataclass of `melinoe.config`.
        panels: Title to names of fields; every field is in one, and comes in this order.
    """
    by_name = {one.name: one for one in fields(settings)}
    hints = get_type_hints(settings)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [one for one in signature.parameters.values() if one.name != "given"]
        options = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=by_name[name].default,
                annotation=Annotated[
                    _type(hints[name]),
                    typer.Option(help=_help(by_name[name]), rich_help_panel=panel),
                ],
            )
            for panel, names in panels.items()
            for name in names
        ]

        def wrapped(**values: Any) -> None:
            given = {name: _value(values.pop(name)) for name in by_name}
            command(**values, given=given)

        parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own] + options
        wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapped.__annotations__ = {one.name: one.annotation for one in parameters}
        wrapped.__doc__ = command.__doc__
        return wrapped

    return decorate


def _type(hint: Any) -> Any:
    """The hint as Typer takes it: a tuple of any length is an option that may be repeated."""
    if hint == tuple[float, ...] | None:
        return list[float] | None
    if hint == tuple[str, ...] | None:
        return list[str] | None
    return hint


def _value(given: Any) -> Any:
    return (tuple(given) or None) if isinstance(given, list) else given


def _help(field: Field[Any]) -> str:
    unit, choices = field.metadata["unit"], field.metadata["choices"]
    text = field.metadata["help"]
    if choices:
        text += f" ({' | '.join(choices() if callable(choices) else choices)})"
    return f"{text} ({unit})" if unit else text
