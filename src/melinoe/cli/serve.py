"""`melinoe serve`, a model behind OpenAI's API; `melinoe batch`, the same without a server."""

import logging
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from melinoe.cli import models, options, output
from melinoe.cli.command import option

SERVER = "Requests and answers"
CacheTokens = Annotated[
    int, option("Room for the keys and values of all requests, in tokens.", SERVER, min=64)
]
_NEEDED = ("fastapi", "uvicorn", "openai", "prometheus_client")


@options.serving(engine="reference")
def command(
    model: options.Model,
    port: Annotated[int, option("Port to listen at; 0 takes a free one.", min=0, max=65535)] = 8000,
    host: Annotated[
        str, option("Address to listen at; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    api_key: Annotated[
        str | None,
        option(
            "Ask this key of every client. Default, and safer: what MELINOE_API_KEY holds.", SERVER
        ),
    ] = None,
    name: Annotated[
        str | None,
        option("Name by which clients ask for the model. Default: the last part of MODEL.", SERVER),
    ] = None,
    chat_template: options.ChatTemplate = None,
    adapter: Annotated[
        list[str] | None,
        option(
            "Also serve this adapter, as NAME=DIR; clients ask for it as for a model. Repeatable.",
            SERVER,
        ),
    ] = None,
    requests: Annotated[int, option("Requests computed at once.", SERVER, min=1)] = 8,
    waiting: Annotated[
        int, option("Requests that may wait; more are answered 429.", SERVER, min=0)
    ] = 64,
    max_context: Annotated[int, option("Tokens of a prompt and its text.", SERVER, min=2)] = 4096,
    max_tokens: Annotated[int, option("Tokens of one answer.", SERVER, min=1)] = 1024,
    cache_tokens: CacheTokens = 16384,
    chunk: Annotated[
        int,
        option("Read a prompt in pieces of so many tokens, to let others write.", SERVER, min=16),
    ] = 256,
    timeout: Annotated[float, option("Seconds that a request may run.", SERVER, min=1)] = 600.0,
    patience: Annotated[
        float, option("Seconds that running requests have to end on a stop.", SERVER, min=0)
    ] = 30.0,
    keep_residency: Annotated[
        Path | None,
        option(
            "Keep here which experts are resident, and begin with those of the last run.", SERVER
        ),
    ] = None,
    predictor: Annotated[
        Path | None,
        option(
            "When a request begins, load what this fitted predictor names for its prompt.", SERVER
        ),
    ] = None,
    log_text: Annotated[
        bool, option("Write prompts and answers to the log, too.", SERVER, name="--log-text")
    ] = False,
    *,
    given: dict[str, Any],
) -> None:
    """Serve a model over HTTP, for OpenAI's clients, with few experts resident."""
    _check_installed()
    try:
        host.encode("idna")
    except UnicodeError:
        raise typer.BadParameter("it is no host's name", param_hint="--host") from None
    from melinoe.generate import context_of
    from melinoe.moe.routing import fingerprint
    from melinoe.serve.batching import Batches, Limits
    from melinoe.serve.metrics import Metrics
    from melinoe.serve.run import Residency, serve

    given = models.share_budget(given, max(cache_tokens, chunk))
    loaded, handle, tokenizer = models.open_model(model, given, chat_template=chat_template)
    adapters = models.adapters(loaded, handle, adapter or [])
    guess = None
    if predictor is not None:
        from melinoe.predictor import Predictor

        guess = Predictor.load(predictor, loaded)
    _log_to_stderr()
    kept = None
    if keep_residency is not None:
        kept = Residency(keep_residency, handle, fingerprint(loaded))
        kept.restore()
    context = min(max_context, context_of(loaded) or max_context)
    limits = Limits(requests, waiting, context, max_tokens, cache_tokens, chunk, timeout)
    metrics = Metrics()
    serve(
        Batches(loaded, handle, limits, metrics.step_done, adapters, tokenizer, guess),
        metrics,
        tokenizer,
        name or Path(models.resolve(model)).resolve().name,
        host=host,
        port=port,
        api_key=api_key or os.environ.get("MELINOE_API_KEY") or None,
        residency=kept,
        patience_s=patience,
        log_text=log_text,
    )


@options.serving(engine="reference")
def batch(
    requests: Annotated[
        Path,
        typer.Argument(
            help="Requests, one a line: OpenAI's batch file, or bodies with messages or a prompt."
        ),
    ],
    out: Annotated[Path, option("JSONL file to write: an answer for each request, in order.")],
    model: Annotated[
        str | None,
        option("A checkpoint directory or a name on the hub. Default: what the requests name."),
    ] = None,
    resume: Annotated[bool, option("Go on with a run that was stopped.", name="--resume")] = False,
    max_new_tokens: Annotated[
        int, option("Tokens of an answer whose request does not say how many.", min=1)
    ] = 512,
    chat_template: options.ChatTemplate = None,
    at_once: Annotated[int, option("Requests computed in one step.", SERVER, min=1)] = 64,
    cache_tokens: CacheTokens = 16384,
    chunk: Annotated[
        int, option("Prompt tokens that one step reads at most.", SERVER, min=16)
    ] = 2048,
    as_json: options.AsJson = False,
    *,
    given: dict[str, Any],
) -> None:
    """Answer a file of requests, many at once, with few experts resident."""
    _check_installed()
    from melinoe.serve.offline import answer_file, named_model, read_rows

    rows = read_rows(requests)
    given = models.share_budget(given, max(cache_tokens, chunk))
    model = model or named_model(rows)
    loaded, handle, tokenizer = models.open_model(model, given, chat_template=chat_template)
    from melinoe.generate import context_of
    from melinoe.moe.routing import fingerprint
    from melinoe.serve.batching import Limits

    context = min(context_of(loaded) or cache_tokens, cache_tokens)
    sizes = (at_once, at_once, context, cache_tokens, cache_tokens, chunk)
    about: dict[str, Any] = {"name": model, "fingerprint": fingerprint(loaded), "resume": resume}
    about["limits"] = Limits(*sizes, seconds=float("inf"), unasked=max_new_tokens)
    with output.counted("answering") as tell:
        made = answer_file(loaded, handle, tokenizer, rows, out, progress=tell, **about)
    if as_json:
        output.show_json({**vars(made), "tokens_per_s": made.tokens_per_s})
        return
    refused = f", {made.refused} of them with an error" if made.refused else ""
    output.say(
        f"{made.rows} requests answered{refused}: {made.completion_tokens} tokens in "
        f"{made.seconds:.1f} s ({made.tokens_per_s:.1f} tokens/s), "
        f"{made.experts_loaded} experts loaded; see {out}"
    )


def _check_installed() -> None:
    if missing := [one for one in _NEEDED if find_spec(one) is None]:
        from melinoe.errors import MelinoeError

        raise MelinoeError(
            f"serving needs {', '.join(missing)}; install them, as the extra `serve` does"
        )


def _log_to_stderr() -> None:
    """Write the server's log to stderr, a line each; requests are JSON, without their text."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger("melinoe.serve")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
