"""
The user names the price, the tool finds the strength.

``finetune_within`` trains the reference, the control without locality terms, or takes one; then it
trains with one weight of the cache term after the other until the cost of a whole run, on held-out
text, is just within the price; or, where one run must do, it steers the weight by the gap to the
reference on the way. Text that chose nothing then judges the result.

All runs see the same data in the same order from the same starting weights.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from melinoe.checkpoint.files import read_config
from melinoe.checkpoint.metadata import read_metadata, write_metadata
from melinoe.checkpoint.tokenizer import load_tokenizer
from melinoe.checkpoint.writing import check_output
from melinoe.config import PLAIN, FinetuneSettings
from melinoe.data import Example, digest, encode, load_examples
from melinoe.errors import OutputExistsError, TrainingError
from melinoe.finetune.price.panel import OWN, Panel
from melinoe.finetune.price.reference import Reference, ReferenceCallback, identity, is_reference
from melinoe.finetune.price.steering import Price, PriceCallback
from melinoe.finetune.price.strength import next_strength
from melinoe.finetune.resume.finished import check_place, is_written
from melinoe.finetune.resume.state import check_same_settings
from melinoe.finetune.run import FinetuneResult, finetune
from melinoe.finetune.taught import beside, train_teacher
from melinoe.finetune.terms.teacher import adapter_digest
from melinoe.finetune.trainer import Progress

# A search ends with a run within the price that has spent so much of it.
_NEAR = 0.65
_OF_EACH_RUN = ("strength", "spent", "spent_at_most", "feasible", "paid", "met", "times_fewer_than")


def describe(outcome: Mapping[str, Any]) -> str:
    """What was paid and bought, in sentences."""
    said = []
    if not outcome["feasible"] and outcome["spent"] <= 1:
        said.append("the held-out texts are too few to tell whether this is within the price")
    elif not outcome["feasible"]:
        said.append("no run was within the price on the texts that choose; this is the nearest")
    for name, bound in outcome["bounds"].items():
        paid = outcome["paid"][name]
        where = "in the domain" if name == OWN else "in other domains"
        verdict = "within" if paid["mean"] <= bound else "ABOVE"
        low, mean, high = (100 * paid[key] for key in ("low", "mean", "high"))
        said.append(
            f"paid {mean:+.2f} % [{low:+.2f}, {high:+.2f}] perplexity {where} on text that chose "
            f"nothing, {verdict} the bound of {100 * bound:g} %"
        )
    ours, theirs = (outcome["transfers_per_token"][who] for who in ("ours", "reference"))
    for policy in ours:
        said.append(
            f"{policy}: {theirs[policy]['mean']:.2f} transfers per token became "
            f"{ours[policy]['mean']:.2f}"
        )
    return f"at strength {outcome['strength']:.3g} " + "; ".join(said)


def finetune_within(
    model_path: str | Path,
    data: str | Path | Sequence[Example],
    out: str | Path,
    settings: FinetuneSettings,
    price: Price,
    *,
    eval_examples: Sequence[Example],
    other_examples: Sequence[Example] | None = None,
    anchor_examples: Sequence[Example] | str | None = None,
    teacher: str | Path | None = None,
    reference: str | Path | None = None,
    runs: int = 4,
    steered: bool = False,
    every: int | None = None,
    progress: Progress | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    resume: bool = False,
) -> FinetuneResult:
    """
    Fine-tune a checkpoint for as much locality as a price in quality buys.

    Args:
        model_path: Checkpoint directory or hub name.
        data: Examples, or what `load_examples` takes.
        out: Directory to write; must not exist, or be empty. Without *reference*, that is
            written beside it, as ``<out>.reference``: the control of *settings*.
        settings: Everything that decides the run; ``lambda_cache`` is where the search starts.
        price: What may be paid.
        eval_examples: Held-out text of the domain: half of it chooses, the other half judges.
        other_examples: Text of other domains, used likewise; it bounds the run only where the price
            says so.
        anchor_examples: As in `finetune`.
        teacher: As in `finetune`, of the reference and of every run; ``"plain"``: trained first,
            as `finetune_taught` does.
        reference: Directory that an earlier call wrote as its reference, for the same base, data,
            texts and settings.
        runs: Trained at most, the reference not counted.
        steered: Train once, and steer the weight during the run.
        every: Steps between measurements; absent: a twenty-fifth of the run.
        progress: As in `finetune`; called for every run.
        callbacks: As in `finetune`; beside ours, in every run.
        resume: As in `finetune`, whichever run was interrupted.

    Returns:
        Of the run with the largest weight that was within the price; if none was, of the one that
        spent least. Its metadata have ``price``: what was paid on the judging texts with intervals,
        whether the price was met, what it bought, and every run that was tried; see `describe`.

    Raises:
        OutputExistsError: *out* or the reference's place is taken; nothing was trained.
        DataError: as `finetune`, or too few held-out texts.
        CheckpointError: as `finetune`.
        TrainingError: as `finetune`; settings that a price cannot be kept with, a bound on other
            domains without their text, or a *reference* of another run.

    Cost: up to *runs* + 1 trainings, and a forward pass of 48 texts at every measurement.
    Runs that were not taken are deleted.
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
    path, name = check_place(out, resume), str(model_path)
    work = path.with_name(f"{path.name}.runs")
    if is_written(path, resume):  # all that was left to do is to clear up
        metadata = read_metadata(path)
        theirs = metadata.get("settings") or {}
        strength = theirs.get("lambda_cache", settings.lambda_cache)
        check_same_settings(path, theirs, replace(settings, lambda_cache=strength))
        if _is_main():
            shutil.rmtree(work, ignore_errors=True)
        return FinetuneResult(path, metadata["log"], metadata)
    directory = _place_of(path, reference, resume)
    # A reference that was named must be there; one that an interrupted call wrote may be.
    found = Reference.load(directory) if reference is not None or is_reference(directory) else None
    tokenizer = load_tokenizer(name, read_config(name))
    panel = Panel.of(
        encode(eval_examples, tokenizer, settings.max_length) if eval_examples else [],
        encode(other_examples, tokenizer, settings.max_length) if other_examples else None,
    )
    examples = load_examples(data) if isinstance(data, (str, Path)) else list(data)
    given = anchor_examples if not isinstance(anchor_examples, str) else None
    anchor = digest(given) if given else None  # else the base's own text, by the seed
    wanted = identity(settings, panel, name, digest(examples), anchor=anchor)
    common: dict[str, Any] = {
        "eval_examples": eval_examples,
        "progress": progress,
        "resume": resume,
    }
    if found is not None:  # before a teacher is trained
        found.check(wanted | {"teacher": found.identity.get("teacher")}, directory)
    if teacher == PLAIN:
        teacher = train_teacher(
            name, examples, beside(path, "teacher"), settings, callbacks=callbacks, **common
        )
    if teacher is not None:
        wanted["teacher"] = adapter_digest(teacher)
    common |= {"anchor_examples": anchor_examples, "teacher": teacher}
    if found is None:
        watch = ReferenceCallback(panel, every)
        finetune(
            name,
            examples,
            directory,
            settings.control(),
            callbacks=[watch, *callbacks],
            **common,
        )
        found = watch.reference(wanted)
        if _is_main():
            found.save(directory)
    found.check(wanted, directory)
    if _is_main() and work.exists() and not resume:
        raise OutputExistsError(
            f"{work} holds runs of a search that did not end; go on with --resume, or delete them"
        )
    tried: list[tuple[FinetuneResult, dict[str, Any]]] = []
    strength = settings.lambda_cache
    while True:
        callback = PriceCallback(panel, price, found, strength, steered=steered)
        result = _one_run(
            name,
            examples,
            work / str(len(tried) + 1),
            replace(settings, lambda_cache=strength),
            [callback, *callbacks],
            **common,
        )
        # Not from the record, which only one of several processes has.
        outcome = callback.outcome or result.metadata["price"]
        tried.append((result, outcome))
        if steered or len(tried) == runs or _is_near(outcome):
            break
        strength = next_strength([(one["strength"], one["spent_at_most"]) for _, one in tried])
    chosen, outcome = _best(tried)
    history = [{key: one[key] for key in _OF_EACH_RUN} for _, one in tried]
    metadata = {**chosen.metadata, "price": {**outcome, "runs": history}}
    if _is_main():
        write_metadata(chosen.out, metadata)
        os.replace(chosen.out, path)
        shutil.rmtree(work)
    return FinetuneResult(path, chosen.log, metadata)


def _one_run(
    name: str,
    examples: Sequence[Example],
    out: Path,
    settings: FinetuneSettings,
    callbacks: Sequence[TrainerCallback],
    *,
    teacher: str | Path | None,
    resume: bool,
    **options: Any,
) -> FinetuneResult:
    """Train once; or read what an interrupted search has trained already."""
    if resume and out.exists():
        metadata = read_metadata(out) or {}
        theirs, taught_by = metadata.get("settings") or {}, metadata.get("teacher") or {}
        same = theirs.get("lambda_cache") == settings.lambda_cache
        if not same or taught_by.get("source") != (None if teacher is None else str(teacher)):
            what = "teacher" if same else "strength"
            raise TrainingError(
                f"{out} is a run with another {what} than this search would try, so the search "
                f"began otherwise; delete {out.parent} and start again"
            )
        check_same_settings(out, theirs, settings)
        return FinetuneResult(out, metadata["log"], metadata)
    return finetune(
        name,
        examples,
        out,
        settings,
        callbacks=callbacks,
        teacher=teacher,
        resume=resume,
        **options,
    )


def _is_near(outcome: Mapping[str, Any]) -> bool:
    """Whether a run is within the price and has spent most of it."""
    return outcome["feasible"] and outcome["spent_at_most"] >= _NEAR


def _best(
    tried: Sequence[tuple[FinetuneResult, dict[str, Any]]],
) -> tuple[FinetuneResult, dict[str, Any]]:
    feasible = [one for one in tried if one[1]["feasible"]]
    if feasible:
        return max(feasible, key=lambda one: one[1]["strength"])
    return min(tried, key=lambda one: one[1]["spent_at_most"])


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"  # one of several processes writes


def reference_place(out: Path) -> Path:
    """Where `finetune_within` writes the reference of the run *out*, unless it is given one."""
    return out.with_name(f"{out.name}.reference")


def _place_of(out: Path, reference: str | Path | None, resume: bool) -> Path:
    """Where the reference is, or will be."""
    if reference is not None:
        return Path(reference).expanduser()
    beside = reference_place(out)
    if resume and is_reference(beside):
        return beside
    if is_written(beside, resume) and _is_main():
        # It was killed before it was measured as a reference, which takes its training.
        shutil.rmtree(beside)
    return check_output(beside)
