"""Run commands, and end each with one line and an exit code where it fails."""

import os
import sys
from typing import Annotated, Any, ClassVar

import typer

from melinoe.cli import (
    bench,
    checkpoints,
    doctor,
    evaluate,
    finetune,
    generate,
    plan,
    report,
    serve,
    simulate,
    traces,
)
from melinoe.cli.command import Command, Group, checked, option
from melinoe.config.names import version_of
from melinoe.errors import InterruptedRunError, MelinoeError
from melinoe.lock import holding

_LONGEST = 1000  # characters of an error that are printed
# Commands under their headings, in the order of the help.
_COMMANDS: dict[str, dict[str, Any]] = {
    "Run a model": {
        "chat": generate.chat,
        "serve": serve.command,
        "generate": generate.command,
        "batch": serve.batch,
        "plan": plan.command,
        "doctor": doctor.command,
        "pack": checkpoints.pack,
        "prune": checkpoints.prune,
    },
    "Fine-tune it for fewer expert loads": {
        "finetune": finetune.command,
        "evaluate": evaluate.command,
        "merge": checkpoints.merge,
        "card": checkpoints.card,
    },
    "Look at its experts": {
        "trace": traces.trace,
        "simulate": simulate.command,
        "bench": bench.command,
        "import-trace": traces.import_trace,
        "predictor": traces.fit,
        "report": report.command,
    },
    "See it all at work": {"demo": checkpoints.demo},
}
# One run at a time may write what --out names; the others append to a file, or write elsewhere.
_LOCKED = {"plan", "pack", "prune", "finetune", "merge", "trace", "import-trace", "predictor"}
_LOCKED |= {"report", "demo"}


class _Melinoe(Group):
    headings: ClassVar[Any] = _COMMANDS


app = typer.Typer(
    name="melinoe",
    cls=_Melinoe,
    help="Run Mixture-of-Experts language models in a fraction of their memory, and measure it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_predictor = typer.Typer(
    help="Learn from a trace which experts a prompt will need.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

for _name, _command in (pair for part in _COMMANDS.values() for pair in part.items()):
    _run = checked(holding("out")(_command) if _name in _LOCKED else _command)
    if _name == "predictor":
        _predictor.command("fit", cls=Command)(_run)
        app.add_typer(_predictor, name=_name)
    else:
        app.command(_name, cls=Command)(_run)


def _version(asked: bool) -> None:
    if asked:
        print(f"melinoe {version_of('melinoe')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, option("Show a traceback on errors.", name="--debug")] = False,
) -> None:
    """Options of every command."""
    if debug:
        os.environ["MELINOE_DEBUG"] = "1"


def main() -> None:
    """Run the command line: exit 0, 1 for what a user can put right, 2 for wrong usage."""
    if hasattr(sys.stdout, "reconfigure"):  # a file's name need not be text that can be printed
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        os.getcwd()
    except OSError as error:  # libraries that look for it would end the process
        _fail(error, "the working directory is gone; change into one that is there")
    try:
        app()
    except MelinoeError as error:
        _fail(error, str(error), 130 if isinstance(error, InterruptedRunError) else 1)
    except KeyboardInterrupt:
        print("melinoe: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); what it wanted, it got.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:  # a path that cannot be used, or a disk that is full or gone
        place = "" if error.filename is None else f"{error.filename}: "
        _fail(error, f"{place}{error.strerror or error}; give another path, or put that right")
    except MemoryError as error:
        _fail(error, "out of memory; give it more, or ask for fewer slots or shorter texts")


def _fail(error: BaseException, sentence: str, code: int = 1) -> None:
    """Print one sentence and exit; with --debug, raise *error* again."""
    if os.environ.get("MELINOE_DEBUG"):
        raise error
    rank = os.environ.get("RANK", "0")
    who = "melinoe" if rank == "0" else f"melinoe (process {rank})"
    if len(sentence) > _LONGEST:  # a value of thousands of characters is not worth repeating
        sentence = f"{sentence[: _LONGEST // 2]} ... {sentence[-_LONGEST // 2 :]}"
    line = sentence.encode("utf-8", "backslashreplace").decode()
    print(f"{who}: {line}", file=sys.stderr)
    sys.exit(code)
