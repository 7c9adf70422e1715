"""
Commands whose help comes in two lengths, and options made from a settings class.

An option without a panel is an everyday one: `--help` lists those, and says how many more there
are. `--help-all` lists all, panel by panel.
"""

import functools
import inspect
import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from melinoe.errors import MelinoeError

HELP_ALL = "--help-all"
_WORDS = {"int": "N", "float": "X", "str": "TEXT", "path": "PATH"}  # in place of types
_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
_KINDS |= {stat.S_IFSOCK: "a socket"}
# What a shell opens for a command: `<(...)`, and standard input by its name.
_OPENED = ("/dev/fd/", "/proc/self/fd/", "/dev/stdin")
# Text that a command reads as it stands, and that names no file.
_TEXTS = frozenset({"prompt", "system", "api_key"})
_LARGEST = 2**63 - 1


class Command(TyperCommand):
    """A command that lists its everyday options with `--help`, and all with `--help-all`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Print the long help if it is asked for; else parse as always."""
        if HELP_ALL in (args[: args.index("--")] if "--" in args else args):
            ctx.meta[HELP_ALL] = True
            print(ctx.get_help())
            ctx.exit()
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments, everyday options, and the other panels or how many options they have."""
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for param in self.get_params(ctx):
            if (record := param.get_help_record(ctx)) is None:
                continue
            panel = getattr(param, "rich_help_panel", None) or "Options"
            panel = "Arguments" if param.param_type_name == "argument" else panel
            sections.setdefault(panel, []).append(_shortened(param, *record))
        others = [panel for panel in sections if panel not in ("Arguments", "Options")]
        if others and HELP_ALL not in ctx.meta:
            count = sum(len(sections.pop(panel)) for panel in others)
            more = f"Show {count} more options: {', '.join(others)}."
            sections["Options"].append((HELP_ALL, more))
        for panel, records in sections.items():
            if records:
                with formatter.section(panel):
                    formatter.write_dl(records)


def _shortened(param: Any, name: str, text: str) -> tuple[str, str]:
    """Give one word for a type, and the one name of a flag that is off by default."""
    for kind, word in _WORDS.items():
        name = re.sub(rf"<(list\[)?{kind}( range)?\]?>", word, name, flags=re.IGNORECASE)
    if getattr(param, "is_flag", False) and param.default is False:
        name, text = name.split(" / ")[0], text.split("  [default: ")[0]
    return name, text


class Group(TyperGroup):
    """A group that lists its commands under headings."""

    headings: ClassVar[Mapping[str, Sequence[str]]] = {}

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the commands, heading by heading."""
        for heading, names in self.headings.items():
            with formatter.section(heading):
                formatter.write_dl(
                    [(name, str(self.commands[name].help).split("\n\n")[0]) for name in names]
                )


def option(help: str, panel: str | None = None, *, name: str | None = None, **bounds: float) -> Any:
    """Describe one option: an everyday one, or one of a panel; *name* where it is not its own."""
    return typer.Option(*([name] if name else []), help=help, rich_help_panel=panel, **bounds)  # type: ignore[arg-type]


def one_of(value: str | None, words: Sequence[str], name: str) -> None:
    """Refuse, as wrong usage, a word that the option *name* does not have."""
    if value is not None and value not in words:
        raise typer.BadParameter(f"{value!r} is not one of {', '.join(words)}", param_hint=name)


def with_settings(
    settings: type, panels: Mapping[str | None, Sequence[str]], **defaults: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """
    Give a command one option for each of some fields of a settings class.

    The command takes ``given``: a dictionary from names to values, for the class. *panels* map
    the title of a panel, None for the everyday options, to names of fields, in order; *defaults*
    are the command's own, where they are not those of the class.
    """
    by_name = {one.name: one for one in fields(settings)}
    panel_of = {name: panel for panel, names in panels.items() for name in names}
    hints, only = get_type_hints(settings), inspect.Parameter.KEYWORD_ONLY

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [one for one in signature.parameters.values() if one.name != "given"]
        parameters = [one.replace(kind=only) for one in own]
        for name, panel in panel_of.items():
            kind: Any = Annotated[_type(hints[name]), option(_help(by_name[name]), panel)]
            default = defaults.get(name, by_name[name].default)
            parameters.append(inspect.Parameter(name, only, default=default, annotation=kind))

        def wrapped(**values: Any) -> None:
            given = {name: _value(values.pop(name)) for name in panel_of}
            command(**values, given=given)

        wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapped.__annotations__ = {one.name: one.annotation for one in parameters}
        wrapped.__doc__ = command.__doc__
        return wrapped

    return decorate


def _type(hint: Any) -> Any:
    """Give the hint as Typer takes it: one type that can be written in a word, or a list of one."""
    if hint in (tuple[float, ...] | None, tuple[str, ...] | None):
        return list[get_args(get_args(hint)[0])[0]] | None  # type: ignore[misc]
    kinds = get_args(hint) or (hint,)
    # Of what can be a number or words, as 8GiB or "lru", the words say more.
    kind = next((one for one in (str, bool, int, float, Path) if one in kinds), str)
    return kind | None if type(None) in kinds or hint is Any else kind


def _value(given: Any) -> Any:
    return (tuple(given) or None) if isinstance(given, list) else given


def _help(field: Field[Any]) -> str:
    unit, choices = field.metadata["unit"], field.metadata["choices"]
    text = field.metadata["help"]
    if choices and not callable(choices):  # a call may look through what is installed
        text += f" ({' | '.join(choices)})"
    text, absent, default = text.partition("; absent: ")
    if unit and unit.split()[0] not in text and "as in" not in text:
        text = f"{text} ({unit})"
    text = f"{text}. Default: {default}" if absent else text
    return f"{text[:1].upper()}{text[1:]}."


def checked(command: Callable[..., Any]) -> Callable[..., Any]:
    """
    Make *command* refuse numbers that are none and devices for files, before it runs.

    A ``~`` at the beginning of a path is the home of a user; shells leave it in ``--out=~/runs``.
    """

    @functools.wraps(command)
    def run(**values: Any) -> Any:
        values = {name: _at_home(name, value) for name, value in values.items()}
        for name, value in values.items():
            for one in _each(value):
                if isinstance(one, int | float):
                    check_number(name, one)
                elif name not in _TEXTS:
                    check_place(one)
        return command(**values)

    return run


def _at_home(name: str, value: Any) -> Any:
    """Write out the homes in a path, or in each of a list."""
    if isinstance(value, list):
        return [_at_home(name, one) for one in value]
    if name in _TEXTS or not isinstance(value, str | Path) or not str(value).startswith("~"):
        return value
    try:
        return type(value)(Path(value).expanduser())
    except RuntimeError:
        raise MelinoeError(f"{value} is in the home of nobody here; write the path out") from None


def _each(value: Any) -> Iterator[str | Path | int | float]:
    if isinstance(value, str | Path | int | float):
        yield value
    elif isinstance(value, Iterable):
        for one in value:
            yield from _each(one)


def check_number(name: str, value: float) -> None:
    """Refuse infinity, what is no number, and integers that need more than 63 bits."""
    if not math.isfinite(value) if isinstance(value, float) else abs(value) > _LARGEST:
        shown = value if isinstance(value, float) else f"{str(value)[:12]}..."
        raise MelinoeError(f"--{name.replace('_', '-')} cannot be {shown}; give a finite number")


def check_place(place: str | Path) -> None:
    """Refuse a pipe, a device or a socket: reading one may never end, and writing replaces it."""
    text = os.fspath(place)
    if text.startswith(_OPENED):
        return
    try:
        kind = _KINDS.get(stat.S_IFMT(os.stat(text).st_mode))
    except (OSError, ValueError):
        return  # nothing is there, or could be: whoever opens it says so
    if kind is not None:
        raise MelinoeError(f"{text} is {kind}, not a file; give the path of a file or a directory")
