"""`melinoe own-text`: let a model write freely, as text to be trained beside other data."""

import json
from pathlib import Path
from typing import Annotated, Any

from melinoe.cli import models, options, output
from melinoe.cli.command import option, with_settings
from melinoe.engine.options import Options


@with_settings(Options, options.SERVING, policy="lfu")
def command(
    model: options.Model,
    out: Annotated[Path, option("The JSONL file to write, one text a row.")],
    texts: Annotated[int, option("Write this many texts.", min=1)] = 512,
    max_new_tokens: Annotated[
        int, option("Generate at most this many tokens for each.", min=8)
    ] = 512,
    seed: Annotated[int, option("Seed of the sampling.")] = 0,
    *,
    given: dict[str, Any],
) -> None:
    """
    Let a model write freely from an empty prompt, for `finetune --anchor-data FILE`.

    Fine-tuning does that by itself, but needs the whole model for it. This command writes from few
    resident experts, for a model that no device holds whole.
    """
    from melinoe.errors import OutputExistsError
    from melinoe.finetune.own_text import own_text

    if out.exists():
        raise OutputExistsError(f"{out} exists; name another file, or remove it first")
    _write(out, "")  # before the work, so that it cannot be for nothing
    try:
        loaded, _, tokenizer = models.open_model(model, given)
        written = own_text(loaded, tokenizer, texts, max_new_tokens, seed=seed)
        rows = [tokenizer.decode(one.input_ids, skip_special_tokens=True) for one in written]
        kept = [json.dumps({"text": row}, ensure_ascii=False) for row in rows if row.strip()]
        _write(out, "".join(f"{row}\n" for row in kept))
    finally:
        if not out.stat().st_size:
            out.unlink()
    output.say(f"{len(kept)} texts -> {out}")


def _write(out: Path, text: str) -> None:
    from melinoe.errors import WriteError
    from melinoe.whole_file import write_whole

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, text)
    except OSError as error:
        message = f"cannot write {out} ({error.strerror}); name a place that can be written to"
        raise WriteError(message) from error
