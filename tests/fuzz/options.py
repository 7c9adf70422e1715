"""Every option of every command, read off the command line itself, and values for each."""

import os
import types
import typing
from pathlib import Path

import typer

from melinoe.cli.app import app

NUMBERS = ["nan", "-1", "0", "1e400", "-inf", "9" * 30, "", "٣", "0x10", " 5 ", "1_0", "five"]
WORDS = [
    "",
    " ",
    "-",
    "nan",
    "-1GiB",
    "infGiB",
    "9" * 400 + "GiB",
    "0",
    "\udcff",
    "ü" * 3000,
    "%s{}",
]


def places(folder: Path) -> dict[str, str]:
    """Name files that are none: what stands where a file is expected."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "directory").mkdir(exist_ok=True)
    (folder / "directory" / "file").write_text("x")
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    (folder / "empty").write_bytes(b"")
    if not (folder / "pipe").exists():
        os.mkfifo(folder / "pipe")
    if not (folder / "loop").is_symlink():
        (folder / "loop").symlink_to(folder / "loop")
    found = {
        name: str(folder / name)
        for name in ("directory", "picture.png", "empty", "pipe", "loop", "absent")
    }
    return found | {
        "long": "/" + "n" * 5000,
        "zeros": "/dev/zero",
        "null": "/dev/null",
        "below a file": str(folder / "picture.png" / "below"),
        "unprintable": str(folder / "\udcff"),
    }


def commands():
    """Each command, as its words, and its parameters."""

    def walk(command, words):
        for name, one in (getattr(command, "commands", None) or {}).items():
            yield from walk(one, (*words, name))
        if not getattr(command, "commands", None):
            yield words, command.params

    yield from walk(typer.main.get_command(app), ())


def kind_of(parameter):
    """The type of one value: int, float, bool, Path or str."""
    kind = parameter.type_descriptor.annotation
    while not isinstance(kind, type) or typing.get_origin(kind) is not None:
        inner = [one for one in typing.get_args(kind) if one is not types.NoneType]
        if not inner:
            return str
        kind = inner[0]
    return kind


def hostile(parameter, files):
    """Values for one parameter; a word may be meant as a file's name, so it gets those too."""
    kind = kind_of(parameter)
    if kind is bool:
        return []
    if kind in (int, float):
        return NUMBERS
    return [*files.values(), *(WORDS if kind is str else ["", "-", "x" * 300])]


def cases(files, base):
    """
    Give (command's words, arguments) for each parameter and each hostile value.

    Args:
        files: What `places` gave.
        base: Command's words -> option or argument's name -> value, with which it would run; an
            option without a value has None.
    """
    for words, parameters in commands():
        for parameter in parameters:
            for value in hostile(parameter, files):
                if words == ("demo",) and key_of(parameter) == "--out" and not is_there(value):
                    continue  # nothing is wrong with it, so the whole demo would run
                given = {**base(words), key_of(parameter): value}
                yield [*words, *arguments(parameters, given)]


def is_there(value):
    """Whether *value* names something that exists, or could not."""
    try:
        os.lstat(value)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return True


def key_of(parameter):
    """The long name of an option, the name of an argument."""
    return next((one for one in parameter.opts if one.startswith("--")), parameter.name)


def arguments(parameters, given):
    """Write a command's options, then its arguments, which may begin with a dash."""
    options = [
        name if value is None else f"{name}={value}"
        for name, value in given.items()
        if name.startswith("--")
    ]
    names = [key_of(one) for one in parameters if not key_of(one).startswith("--")]
    return [*options, "--", *(given[name] for name in names if name in given)]
