"""`melinoe batch`: a file of requests, answered for throughput."""

from pathlib import Path
from typing import Annotated, Any

import typer

from melinoe.cli import models, options, output, serve
from melinoe.cli.command import option

BATCH = "Batch"


@options.serving(engine="reference")
def command(
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
    at_once: Annotated[int, option("Requests computed in one step.", BATCH, min=1)] = 64,
    cache_tokens: Annotated[
        int, option("Room for the keys and values of all requests, in tokens.", BATCH, min=64)
    ] = 16384,
    chunk: Annotated[
        int, option("Prompt tokens that one step reads at most.", BATCH, min=16)
    ] = 2048,
    as_json: options.AsJson = False,
    *,
    given: dict[str, Any],
) -> None:
    """Answer a file of requests, many at once, with few experts resident."""
    serve.check_installed()
    from melinoe.serve.offline import answer_file, named_model, read_rows

    rows = read_rows(requests)
    if given.get("slots") is None and given.get("expert_memory") is None and models.on_gpu(given):
        # What the budget of a GPU counts beside the experts: the keys and values of all requests.
        given = {**given, "batch": 1, "context": max(cache_tokens, chunk)}
    model = model or named_model(rows)
    loaded, handle, tokenizer = models.open_model(model, given, chat_template=chat_template)
    from melinoe.generate import context_of
    from melinoe.moe.routing import fingerprint
    from melinoe.serve.batching import Limits

    context = context_of(loaded) or cache_tokens
    with output.counted("answering") as tell:
        made = answer_file(
            loaded,
            handle,
            tokenizer,
            rows,
            out,
            name=model,
            fingerprint=fingerprint(loaded),
            limits=Limits(
                running=at_once,
                waiting=at_once,
                context=min(context, cache_tokens),
                max_tokens=cache_tokens,
                cache_tokens=cache_tokens,
                chunk=chunk,
                seconds=float("inf"),
                unasked=max_new_tokens,
            ),
            resume=resume,
            progress=tell,
        )
    if as_json:
        output.show_json({**vars(made), "tokens_per_s": made.tokens_per_s})
        return
    refused = f", {made.refused} of them with an error" if made.refused else ""
    output.say(
        f"{made.rows} requests answered{refused}: {made.completion_tokens} tokens in "
        f"{made.seconds:.1f} s ({made.tokens_per_s:.1f} tokens/s), "
        f"{made.experts_loaded} experts loaded; see {out}"
    )
