"""Print: data to stdout, as a table or JSON; notes and progress to stderr."""

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Values of a log row that a progress bar shows.
_SHOWN = ("total", "nll", "cache", "eval_nll", "eval_cache", "skipped_steps")


def is_main_process() -> bool:
    """Tell whether this process is alone, or the first of several that were launched."""
    return os.environ.get("RANK", "0") == "0"


def quiet() -> None:
    """Silence the progress bars and notices of libraries, and the warnings of other processes."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if not is_main_process():
        logging.getLogger("melinoe").setLevel(logging.ERROR)


def say(text: str) -> None:
    """Print a note to stderr, from the first process only."""
    if is_main_process():
        print(text, file=sys.stderr, flush=True)


def show_json(value: Any) -> None:
    """Print JSON to stdout."""
    print(json.dumps(value, indent=1, ensure_ascii=False, default=str))


def show_table(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows of equal keys as a table to stdout."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", title_style="bold")
    for name in rows[0]:
        # Fold, or a narrow terminal would cut numbers; Text, or brackets in a path would be markup.
        justify: Any = "left" if any(isinstance(row[name], str) for row in rows) else "right"
        table.add_column(name.replace("_", " "), justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row.values()))
    Console().print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


class Lines:
    """Report training by a line for each log row."""

    callbacks: tuple[Any, ...] = ()

    def __call__(self, row: dict[str, Any]) -> None:
        """Print a log row: the step, then each term."""
        terms = "  ".join(f"{key} {one:.4g}" for key, one in row.items() if isinstance(one, float))
        say(f"step {row.get('step', 0)} of {row.get('steps', '?')}  {terms}")


class Bar:
    """
    Report training by a bar that moves with every step, with the newest values beside it.

    Args:
        display: `rich.progress.Progress`, shown already, with a column for the field ``terms``.
    """

    def __init__(self, display: Any):
        from transformers import TrainerCallback

        task = display.add_task("training", total=None, terms="")
        self.show = lambda **more: display.update(task, **more)
        self.newest: dict[str, Any] = {}
        bar = self

        class Move(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                bar.show(total=state.max_steps, completed=state.global_step)

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                bar.show(completed=state.global_step)

        self.callbacks = (Move(),)

    def __call__(self, row: dict[str, Any]) -> None:
        """Take a log row."""
        self.newest |= {name: row[name] for name in _SHOWN if row.get(name) is not None}
        if not self.newest.get("skipped_steps"):
            self.newest.pop("skipped_steps", None)
        shown = [name for name in _SHOWN if name in self.newest]
        self.show(terms="  ".join(f"{name} {self.newest[name]:.4g}" for name in shown))


@contextmanager
def training_progress() -> Iterator[Lines | Bar]:
    """Give a run's ``progress``, with ``callbacks``: a bar on a terminal, else lines."""
    if not sys.stderr.isatty() or not is_main_process():
        yield Lines()
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("step"),
        progress.MofNCompleteColumn(),
        progress.BarColumn(bar_width=20),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[terms]}"),
    )
    with progress.Progress(*columns, console=Console(stderr=True)) as display:
        yield Bar(display)


@contextmanager
def counted(doing: str) -> Iterator[Callable[[int, int], None]]:
    """Say what is done, and on a terminal show how many of how many are."""
    if not sys.stderr.isatty():
        say(doing)
        yield lambda done, of: None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as display:
        task = display.add_task(escape(doing), total=None)  # brackets of a path are no markup
        yield lambda done, of: display.update(task, completed=done, total=of)
