"""Print: data to stdout, as a table or JSON; notes and progress to stderr."""

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


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
    """Print JSON to stdout; what its encoding does not have is escaped as JSON has it."""
    text = json.dumps(value, indent=1, ensure_ascii=False, default=str)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=1, default=str)
    print(text)


def show_table(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows of equal keys as a table to stdout."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", title_style="bold")
    for name in rows[0]:
        # Fold, or a narrow terminal would cut numbers; Text, or brackets in a path would be markup.
        justify: Any = "left" if any(isinstance(row.get(name), str) for row in rows) else "right"
        table.add_column(name.replace("_", " "), justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*(Text(_cell(row.get(name))) for name in rows[0]))
    Console().print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def training_progress(row: dict[str, Any]) -> None:
    """Print a log row of training: the step, then each term."""
    terms = "  ".join(f"{key} {one:.4g}" for key, one in row.items() if isinstance(one, float))
    say(f"step {row.get('step', 0)} of {row.get('steps', '?')}  {terms}")


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
