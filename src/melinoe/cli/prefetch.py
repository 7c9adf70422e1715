"""`melinoe prefetch`: what strategies of prefetch there are."""

import typer

from melinoe.cli import options, output
from melinoe.cli.command import Command

app = typer.Typer(
    help="Strategies that load experts ahead of need.", no_args_is_help=True, rich_markup_mode=None
)


@app.command("list", cls=Command)
def list_command(as_json: options.AsJson = False) -> None:
    """Print every prefetch that can be named, with what it is made of and when it loads."""
    from melinoe.cache.prefetch import NONE, prefetcher_class, prefetcher_names

    rows = []
    for name in prefetcher_names():
        about = "Nothing is loaded ahead."
        if name != NONE:
            cls = prefetcher_class(name)
            words = (cls.__doc__ or "").strip().split("\n\n")[0]
            about = " ".join(words.split())
            about = about or f"{cls.__module__}:{cls.__qualname__}, which does not say."
        rows.append({"prefetch": name, "what it loads": about})
    if as_json:
        output.show_json(rows)
    else:
        output.show_table("prefetches", rows)
