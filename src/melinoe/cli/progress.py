"""How far a run is: a live bar on a terminal, a plain line per log row elsewhere; on stderr."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from melinoe.cli import options

_SHOWN = ("total", "nll", "cache", "eval_nll", "eval_cache", "skipped_steps")


def describe_row(row: dict[str, Any]) -> str:
    """One log row in one line: the step, then each term."""
    terms = "  ".join(f"{name} {value:.4g}" for name, value in row.items() if _is_term(value))
    return f"step {row.get('step', 0)} of {row.get('steps', '?')}  {terms}"


def _is_term(value: Any) -> bool:
    return isinstance(value, float)


class Lines:
    """A line for each row; and where several processes run, only the first one's."""

    callbacks: tuple[Any, ...] = ()

    def __call__(self, row: dict[str, Any]) -> None:
        """Take a log row."""
        options.say(describe_row(row))


class Bar:
    """
    A bar that moves with every step, and the newest value of what matters most beside it.

    Args:
        display: `rich.progress.Progress`, shown already, with a column for the field ``terms``.
    """

    def __init__(self, display: Any):
        from transformers import TrainerCallback

        self.display = display
        self.task = display.add_task("training", total=None, terms="")
        self.newest: dict[str, Any] = {}
        bar = self

        class Move(TrainerCallback):
            """Moves the bar."""

            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                bar.display.update(bar.task, total=state.max_steps, completed=state.global_step)

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                bar.display.update(bar.task, completed=state.global_step)

        self.callbacks = (Move(),)

    def __call__(self, row: dict[str, Any]) -> None:
        """Take a log row."""
        self.newest |= {name: row[name] for name in _SHOWN if row.get(name) is not None}
        if not self.newest.get("skipped_steps"):
            self.newest.pop("skipped_steps", None)
        terms = "  ".join(
            f"{name} {self.newest[name]:.4g}" for name in _SHOWN if name in self.newest
        )
        self.display.update(self.task, terms=terms)


@contextmanager
def training_progress() -> Iterator[Lines | Bar]:
    """What to give a run as ``progress``, and its ``callbacks`` as such."""
    if not sys.stderr.isatty() or not options.is_main_process():
        yield Lines()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[terms]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as display:
        yield Bar(display)


@contextmanager
def counted(doing: str) -> Iterator[Callable[[int, int], None]]:
    """Say what is being done; on a terminal a bar shows how many are done of how many."""
    if not sys.stderr.isatty():
        options.say(doing)
        yield lambda done, of: None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as display:
        task = display.add_task(escape(doing), total=None)  # brackets of a path are no markup
        yield lambda done, of: display.update(task, completed=done, total=of)
