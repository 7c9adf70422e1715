"""The application, and what every command has in common: one-line errors and exit codes."""

import os
import sys
from typing import Annotated

import typer

from melinoe.cli import (
    bench,
    card,
    demo,
    doctor,
    evaluate,
    finetune,
    generate,
    import_trace,
    merge,
    own_text,
    plan,
    predictor,
    prefetch,
    report,
    simulate,
    trace,
)
from melinoe.cli.settings import PanelCommand
from melinoe.cli.values import checked
from melinoe.config.names import version_of
from melinoe.errors import InterruptedRunError, MelinoeError
from melinoe.lock import holding

# Characters of an error that are printed.
_LONGEST = 1000

app = typer.Typer(
    name="melinoe",
    help="Run Mixture-of-Experts language models in a fraction of their memory, and measure it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Commands that write to what --out names; those that append lines to it may run at once.
app.command("demo")(holding("out")(demo.command))
app.command("doctor")(doctor.command)
app.command("plan")(holding("out")(plan.command))
app.command("finetune", cls=PanelCommand)(holding("out")(finetune.command))
app.command("merge")(holding("out")(merge.command))
app.command("card")(card.command)
app.command("own-text")(holding("out")(own_text.command))
app.command("trace")(holding("out")(trace.command))
app.add_typer(predictor.app, name="predictor")
app.add_typer(prefetch.app, name="prefetch")
app.command("generate")(generate.command)
app.command("import-trace")(holding("out")(import_trace.command))
app.command("simulate")(simulate.command)
app.command("bench")(bench.command)
app.command("evaluate")(evaluate.command)
app.command("report")(holding("out")(report.command))

for _part in (app, predictor.app, prefetch.app):
    for _registered in _part.registered_commands:
        assert _registered.callback is not None
        _registered.callback = checked(_registered.callback)


def _version(asked: bool) -> None:
    if asked:
        print(f"melinoe {version_of('melinoe')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback on errors.")] = False,
) -> None:
    """Options of every command."""
    if debug:
        os.environ["MELINOE_DEBUG"] = "1"


def main() -> None:
    """Run the command line: exit 0, 1 for what a user can put right, 2 for wrong usage."""
    if hasattr(sys.stdout, "reconfigure"):  # a file's name need not be text that can be printed
        sys.stdout.reconfigure(errors="backslashreplace")
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
        place = f"{error.filename}: " if error.filename is not None else ""
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
