"""`melinoe serve`: a model behind the API of OpenAI's clients."""

import logging
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from melinoe.cli import models, options, output
from melinoe.cli.command import with_settings

SERVER = "Server"
_NEEDED = ("fastapi", "uvicorn", "openai", "prometheus_client")


@with_settings(options.ModelOptions, options.model_panels())
def command(
    model: options.Model,
    port: Annotated[int, typer.Option(help="Port to listen at; 0 takes a free one.", min=0)] = 8000,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    api_key: Annotated[
        str | None,
        typer.Option(
            help="Ask this key of every client. Default: what MELINOE_API_KEY holds.",
            rich_help_panel=SERVER,
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="Name by which clients ask for the model.", rich_help_panel=SERVER),
    ] = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(
            help="A Jinja file for a model that brings no chat template.", rich_help_panel=SERVER
        ),
    ] = None,
    requests: Annotated[
        int, typer.Option(help="Requests computed at once.", min=1, rich_help_panel=SERVER)
    ] = 8,
    waiting: Annotated[
        int,
        typer.Option(
            help="Requests that may wait; more are answered 429.", min=0, rich_help_panel=SERVER
        ),
    ] = 64,
    max_context: Annotated[
        int, typer.Option(help="Tokens of a prompt and its text.", min=2, rich_help_panel=SERVER)
    ] = 4096,
    max_tokens: Annotated[
        int, typer.Option(help="Tokens of one answer.", min=1, rich_help_panel=SERVER)
    ] = 1024,
    cache_tokens: Annotated[
        int,
        typer.Option(
            help="Room for the keys and values of all requests, in tokens.",
            min=64,
            rich_help_panel=SERVER,
        ),
    ] = 16384,
    chunk: Annotated[
        int,
        typer.Option(
            help="Read a prompt in pieces of so many tokens, so that others write meanwhile.",
            min=16,
            rich_help_panel=SERVER,
        ),
    ] = 256,
    timeout: Annotated[
        float, typer.Option(help="Seconds that a request may run.", min=1, rich_help_panel=SERVER)
    ] = 600.0,
    patience: Annotated[
        float,
        typer.Option(
            help="Seconds that running requests have when the server is told to stop.",
            min=0,
            rich_help_panel=SERVER,
        ),
    ] = 30.0,
    keep_residency: Annotated[
        Path | None,
        typer.Option(
            help="Load the experts that were resident when the last server stopped, and write "
            "them here every minute and at the end.",
            rich_help_panel=SERVER,
        ),
    ] = None,
    *,
    given: dict[str, Any],
) -> None:
    """Serve a model over HTTP, for OpenAI's clients, with few experts resident."""
    if missing := [one for one in _NEEDED if find_spec(one) is None]:
        from melinoe.errors import MelinoeError

        raise MelinoeError(
            f"serving needs {', '.join(missing)}: install it with pip install 'melinoe[serve]'"
        )
    from melinoe.moe.routing import fingerprint
    from melinoe.serve.batching import Limits
    from melinoe.serve.run import Residency, serve

    template = None if chat_template is None else chat_template.read_text(encoding="utf-8")
    loaded, handle, tokenizer = models.open_model(model, options.ModelOptions(**given))
    if template is not None:
        tokenizer.chat_template = template
    context = getattr(loaded.config.get_text_config(), "max_position_embeddings", max_context)
    _log_to_stderr()
    output.say(f"{handle.slots} of {handle.layers[0].num_experts} experts a layer resident")
    kept = None
    if keep_residency is not None:
        kept = Residency(keep_residency, handle, fingerprint(loaded))
    serve(
        loaded,
        handle,
        tokenizer,
        name or Path(model).name,
        host=host,
        port=port,
        limits=Limits(
            requests, waiting, min(max_context, context), max_tokens, cache_tokens, chunk, timeout
        ),
        api_key=api_key or os.environ.get("MELINOE_API_KEY") or None,
        residency=kept,
        patience_s=patience,
    )


def _log_to_stderr() -> None:
    """Write the server's log to stderr, a line each; requests are JSON, without their text."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log = logging.getLogger("melinoe.serve")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
