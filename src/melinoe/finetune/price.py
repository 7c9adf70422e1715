"""
The user names the price, the tool finds the strength.

``finetune_within`` trains the NLL-only reference, or takes one, then trains once more with the
weight of the cache term steered so that the gap to the reference, on held-out text and at the same
step, stays within the price. What is left over at the end is taken back exactly: the weights are
drawn towards the reference's until the gap is within the price. Text that neither step saw then
judges the result.

Both runs see the same data in the same order from the same starting weights, so what lies between
their ends is short, and the gap on the way grows steadily from 0 at the reference.
"""

import os
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from melinoe.checkpoint.files import read_config
from melinoe.checkpoint.tokenizer import load_tokenizer
from melinoe.checkpoint.writing import check_output
from melinoe.config import FinetuneSettings
from melinoe.data import Example, encode, load_examples
from melinoe.errors import TrainingError
from melinoe.finetune.panel import OWN, Panel
from melinoe.finetune.reference import Reference, ReferenceCallback, identity, is_reference
from melinoe.finetune.run import FinetuneResult, finetune
from melinoe.finetune.steering import Price, PriceCallback
from melinoe.finetune.trainer import Progress


def describe(outcome: Mapping[str, Any]) -> str:
    """What was paid and bought, in sentences."""
    said = []
    for name, bound in outcome["bounds"].items():
        paid = outcome["paid"][name]
        where = "in the domain" if name == OWN else "in other domains"
        verdict = "within" if paid["mean"] <= bound else "ABOVE"
        low, mean, high = (100 * paid[key] for key in ("low", "mean", "high"))
        said.append(
            f"paid {mean:+.2f} % [{low:+.2f}, {high:+.2f}] perplexity {where} on text that was not "
            f"tuned on, {verdict} the bound of {100 * bound:g} %"
        )
    if outcome["kept"] == 0:
        said.append("no model with a cache term was within the price, so this is the reference")
    elif outcome["kept"] < 1:
        said.append(f"kept {100 * outcome['kept']:.0f} % of the way from the reference")
    ours, theirs = (outcome["transfers_per_token"][who] for who in ("ours", "reference"))
    for policy in ours:
        said.append(
            f"{policy}: {theirs[policy]['mean']:.2f} transfers per token became "
            f"{ours[policy]['mean']:.2f}"
        )
    return "; ".join(said)


def finetune_within(
    model_path: str | Path,
    data: str | Path | Sequence[Example],
    out: str | Path,
    settings: FinetuneSettings,
    price: Price,
    *,
    eval_examples: Sequence[Example],
    other_examples: Sequence[Example] | None = None,
    anchor_examples: Sequence[Example] | None = None,
    reference: str | Path | None = None,
    every: int | None = None,
    progress: Progress | None = None,
    resume: bool = False,
) -> FinetuneResult:
    """
    Fine-tune a checkpoint for as much locality as a price in quality buys.

    Args:
        model_path: Checkpoint directory or hub name.
        data: Examples, or what `load_examples` takes.
        out: Directory to write; must not exist, or be empty. Without *reference*, the NLL-only run
            is written beside it, as ``<out>.reference``.
        settings: Everything that decides the run; ``lambda_cache`` is where the search starts.
        price: What may be paid.
        eval_examples: Held-out text of the domain: a third of it, at most 48 texts, steers and ends
            the search; the rest judges.
        other_examples: Text of other domains, used likewise; it bounds the run only where the price
            says so.
        anchor_examples: As in `finetune`.
        reference: Directory that an earlier call wrote as its reference, for the same base, data,
            texts and settings.
        every: Steps between measurements; absent: a twenty-fifth of the run.
        progress: As in `finetune`; called for both runs.
        resume: As in `finetune`, whichever of the two runs was interrupted.

    Returns:
        Of the second run. Its metadata have ``price``: what was paid on the judging texts with
        intervals, whether the price was met, and what it bought; see `describe`.

    Raises:
        OutputExistsError: *out* or the reference's place is taken; nothing was trained.
        DataError: as `finetune`, or too few held-out texts.
        TrainingError: as `finetune`; settings that a price cannot be kept with, a bound on other
            domains without their text, or a *reference* of another run.

    Cost: two trainings, and the steering texts' forward pass at every measurement.
    """
    if settings.lambda_cache == 0:
        raise TrainingError(
            "lambda_cache is 0, so there is nothing to find a strength for; leave it at its default"
        )
    if settings.keep != "last":
        raise TrainingError(
            "a price is settled after the last step, so no earlier weights can be kept; leave keep "
            "at last"
        )
    if price.other is not None and not other_examples:
        raise TrainingError(
            "a bound on other domains needs text of theirs; give other data, or leave the bound out"
        )
    path, name = check_output(out), str(model_path)
    directory = _place_of(path, reference, resume)
    # A reference that was named must be there; one that an interrupted call wrote may be.
    found = Reference.load(directory) if reference is not None or is_reference(directory) else None
    tokenizer = load_tokenizer(name, read_config(name))
    panel = Panel.of(
        encode(eval_examples, tokenizer, settings.max_length),
        encode(other_examples, tokenizer, settings.max_length) if other_examples else None,
    )
    examples = load_examples(data) if isinstance(data, (str, Path)) else list(data)
    wanted = identity(settings, panel, name, _fingerprint(examples))
    if found is None:
        watch = ReferenceCallback(panel, every)
        finetune(
            name,
            examples,
            directory,
            settings.control(),
            eval_examples=eval_examples,
            progress=progress,
            callbacks=[watch],
            resume=resume,
        )
        found = watch.reference(wanted)
        if os.environ.get("RANK", "0") == "0":  # one of several processes writes
            found.save(directory)
    found.check(wanted, directory)
    return finetune(
        name,
        examples,
        path,
        settings,
        eval_examples=eval_examples,
        anchor_examples=anchor_examples,
        progress=progress,
        callbacks=[PriceCallback(panel, price, found, settings.lambda_cache)],
        resume=resume,
    )


def _place_of(out: Path, reference: str | Path | None, resume: bool) -> Path:
    """Where the reference is, or will be."""
    if reference is not None:
        return Path(reference).expanduser()
    beside = out.with_name(f"{out.name}.reference")
    return beside if resume and is_reference(beside) else check_output(beside)


def _fingerprint(examples: Sequence[Example]) -> str:
    digest = sha256()
    for one in examples:
        digest.update(f"{one.prompt!r} {one.completion!r} {one.messages!r}\n".encode())
    return digest.hexdigest()
