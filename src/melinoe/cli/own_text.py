"""`melinoe own-text`: what a model writes from an empty prompt, as anchor text for its training."""

import json
from pathlib import Path
from typing import Annotated

import typer

from melinoe.cli import options


def command(
    model: options.Model,
    out: Annotated[Path, typer.Option(help="The JSONL file to write, one text a row.")],
    texts: Annotated[int, typer.Option(help="How many.", min=1)] = 512,
    length: Annotated[int, typer.Option(help="Tokens of each at most.", min=8)] = 512,
    seed: Annotated[int, typer.Option(help="Decides them.")] = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    slots: options.Slots = None,
    expert_memory: options.ExpertMemory = None,
    policy: options.Policy = "lfu",
    store: options.StoreKind = "auto",
) -> None:
    """
    Let a model write freely, from few resident experts, for `finetune --anchor-data FILE`.

    That is what `--anchor-data own` does by itself before a run, but for a model that no device
    holds whole, such as one that will be trained sharded.
    """
    from melinoe.errors import OutputExistsError
    from melinoe.finetune.terms.own_text import own_text

    if out.exists():
        raise OutputExistsError(f"{out} exists; name another file, or remove it first")
    _write(out, "")  # before the work, so that it cannot be for nothing
    try:
        loaded, _, tokenizer = options.open_model(
            model, device, dtype, slots, expert_memory, policy, store
        )
        written = own_text(loaded, tokenizer, texts, length, seed=seed)
        rows = [tokenizer.decode(one.input_ids, skip_special_tokens=True) for one in written]
        kept = [json.dumps({"text": row}, ensure_ascii=False) for row in rows if row.strip()]
        _write(out, "".join(f"{row}\n" for row in kept))
    finally:
        if not out.stat().st_size:
            out.unlink()
    options.say(f"{len(kept)} texts -> {out}")


def _write(out: Path, text: str) -> None:
    from melinoe.errors import WriteError
    from melinoe.whole_file import write_whole

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, text)
    except OSError as error:
        message = f"cannot write {out} ({error.strerror}); name a place that can be written to"
        raise WriteError(message) from error
