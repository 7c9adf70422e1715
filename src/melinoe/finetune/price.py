"""
Find the strongest cache term within a price that the user names.

The price is an increase of perplexity over the control, the same run without the locality term, on
held-out text. `finetune_within` trains the control, then whole runs with one ``lambda_cache`` after
the other, until one is just within the price. All see the same data in the same order from the same
starting weights.

Half of the held-out texts choose. The others choose nothing: what was paid is measured on them, by
`melinoe.outcome.record_outcome` against the control.
"""

import hashlib
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback

from melinoe.checkpoint.files import read_config
from melinoe.checkpoint.metadata import read_metadata, write_metadata
from melinoe.checkpoint.tokenizer import load_tokenizer
from melinoe.config import PLAIN, FinetuneSettings
from melinoe.data import IGNORED, Collator, Encoded, Example, encode, has_completion, load_examples
from melinoe.errors import DataError, OutputExistsError, TrainingError
from melinoe.finetune.objective import logits_of, model_outputs
from melinoe.finetune.run import (
    FinetuneResult,
    beside,
    check_place,
    finetune,
    is_written,
    train_control,
    train_teacher,
)
from melinoe.moe.finite import broken_weight
from melinoe.stats import paired_difference

_NEAR = 0.65  # a search ends with a run within the price that has spent so much of it
_AIM = 0.85  # share of the price to aim at; what is left covers the noise of the measurement
_FEWEST = 6  # held-out texts of a domain
# One standard error above the gap must be within: the choosing texts are only a sample.
_LEVEL = 0.6827


@dataclass(frozen=True)
class Price:
    """
    Bounds on the increase of perplexity over the control, as shares.

    Attributes:
        own: On held-out text of the domain that is trained on.
        other: On text of other domains; ``None``: no bound there.
    """

    own: float
    other: float | None = None

    def __post_init__(self) -> None:
        for value in self.bounds.values():
            if not value > 0:
                raise TrainingError(f"an increase of {value} leaves nothing to spend; give 0.01")

    @property
    def bounds(self) -> dict[str, float]:
        """Domain to its bound."""
        return {"own": self.own} if self.other is None else {"own": self.own, "other": self.other}


def parse_increase(text: str) -> float:
    """
    Read an increase of perplexity as a share: ``"1%"`` and ``"0.01"`` are both 0.01.

    Raises:
        TrainingError: no number, not above 0, or a bare number of 1 or more, which may mean either.
    """
    given = text.strip()
    percent = given.endswith("%")
    try:
        value = float(given.removesuffix("%")) / (100 if percent else 1)
    except ValueError:
        raise TrainingError(f"{given!r} is no increase of perplexity; write 1% or 0.01") from None
    if not math.isfinite(value) or value <= 0:
        raise TrainingError(f"an increase of {given} leaves nothing to spend; write 1% or 0.01")
    if value >= 1 and not percent:
        raise TrainingError(
            f"an increase of {given} may mean {value:g} % or {100 * value:g} %; write it with a "
            "percent sign"
        )
    return value


def halves(
    examples: Sequence[Example], tokenizer: Any, max_length: int
) -> tuple[list[Example], list[Example]]:
    """
    Split held-out examples: every second one chooses, the others judge.

    Those without a completion within *max_length* tokens are in neither half.
    """
    kept = [one for one in examples if has_completion(one, tokenizer, max_length)]
    return kept[::2], kept[1::2]


def finetune_within(
    model_path: str | Path,
    data: str | Path | Sequence[Example],
    out: str | Path,
    settings: FinetuneSettings,
    price: Price,
    *,
    eval_examples: Sequence[Example],
    other_examples: Sequence[Example] | None = None,
    runs: int = 4,
    teacher: str | Path | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    resume: bool = False,
    **options: Any,
) -> FinetuneResult:
    """
    Fine-tune a checkpoint for as much locality as a price in quality buys.

    Args:
        model_path, data, out, teacher, callbacks, resume: As in `finetune`; the control is written
            beside *out*, as ``<out>.control``.
        settings: Everything that decides a run; ``lambda_cache`` is where the search starts.
        price: What may be paid.
        eval_examples: Held-out text of the domain; half of it chooses.
        other_examples: Text of other domains, used likewise where the price bounds the run there.
        runs: Trained at most, the control not counted.
        options: Of `finetune`, for every run.

    Returns:
        The run with the largest weight that was within the price; if none was, the one that spent
        least. ``price`` in its metadata says what was asked for, what was spent on the choosing
        texts, and every weight that was tried; see `describe`.

    Raises:
        OutputExistsError: *out* or a place beside it is taken; nothing was trained.
        DataError: as `finetune`, or too few held-out texts.
        TrainingError: as `finetune`; settings that a price cannot be kept with, or a bound on other
            domains without their text; or, resumed, *out* was trained within another price.

    Cost: up to *runs* + 1 trainings. Runs that were not taken are deleted.
    """
    if settings.is_control:
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
    main = os.environ.get("RANK", "0") == "0"  # one of several processes writes
    work = beside(path, "runs")
    if is_written(path, resume):  # all that was left to do is to clear up
        metadata = read_metadata(path)
        bounds = (metadata.get("price") or {}).get("bounds")
        if bounds != price.bounds:
            raise TrainingError(
                f"{path} was trained {_within(bounds)}, not {_within(price.bounds)}; give what it "
                "was given, or another --out"
            )
        chosen = replace(settings, lambda_cache=metadata["settings"]["lambda_cache"])
        result = finetune(name, data, path, chosen, teacher=teacher, resume=True, **options)
        if main:
            shutil.rmtree(work, ignore_errors=True)
        return result
    for what in ("control", "teacher") if teacher == PLAIN else ("control",):
        check_place(beside(path, what), resume)
    if main and work.exists() and not resume:
        raise OutputExistsError(
            f"{work} holds runs of a search that did not end; go on with --resume, or delete them"
        )
    others = (other_examples or []) if price.other is not None else []
    texts = _choosing(name, settings, {"own": eval_examples, "other": others})
    examples = load_examples(data) if isinstance(data, (str, Path)) else list(data)
    common: dict[str, Any] = {**options, "eval_examples": eval_examples, "resume": resume}
    if teacher == PLAIN:
        teacher = train_teacher(name, examples, path, settings, callbacks=callbacks, **common)
    common["teacher"] = teacher
    watch = _Costs(texts)
    control = train_control(name, examples, path, settings, callbacks=[watch, *callbacks], **common)
    theirs = watch.of(control)
    tried: list[tuple[FinetuneResult, dict[str, Any]]] = []
    strength = settings.lambda_cache
    while True:
        watch, place = _Costs(texts), work / str(len(tried) + 1)
        chosen = replace(settings, lambda_cache=strength)
        if is_written(place, resume):
            before = (read_metadata(place).get("settings") or {}).get("lambda_cache")
            if before != strength:
                raise TrainingError(
                    f"{place} is a run with another strength than this search would try, so the "
                    f"search began otherwise; delete {work} and start again"
                )
        result = finetune(
            name, examples, place, chosen, callbacks=[watch, *callbacks], **common
        )  # fmt: skip
        tried.append((result, _spent(watch.of(place), theirs, price) | {"strength": strength}))
        done = tried[-1][1]
        if len(tried) == runs or (done["feasible"] and done["spent_at_most"] >= _NEAR):
            break
        strength = next_strength([(one["strength"], one["spent_at_most"]) for _, one in tried])
    feasible = [one for one in tried if one[1]["feasible"]]
    if feasible:
        best, outcome = max(feasible, key=lambda one: one[1]["strength"])
    else:
        best, outcome = min(tried, key=lambda one: one[1]["spent_at_most"])
    outcome = {**outcome, "bounds": price.bounds, "runs": [one for _, one in tried]}
    metadata = {k: v for k, v in best.metadata.items() if k != "costs"} | {"price": outcome}
    if main:
        write_metadata(best.out, metadata)
        os.replace(best.out, path)
        shutil.rmtree(work)
    return FinetuneResult(path, best.log, metadata)


def describe(price: Mapping[str, Any]) -> str:
    """Say in a sentence which strength was taken, and why."""
    spent = f"it spent {price['spent']:.0%} of the price on the texts that choose"
    if price["feasible"]:
        why = f"of {len(price['runs'])} runs the strongest within the price; {spent}"
    elif price["spent"] <= 1:
        why = f"{spent}, but they are too few to tell whether that is within it"
    else:
        why = (
            f"none of {len(price['runs'])} runs was within the price, and this one came nearest; "
            f"{spent}"
        )
    return f"lambda_cache {price['strength']:.3g}: {why}"


def _within(bounds: Mapping[str, float] | None) -> str:
    if bounds is None:
        return "without a price"
    return "within " + " and ".join(f"{bound:.4g} on {one} texts" for one, bound in bounds.items())


def next_strength(tried: Sequence[tuple[float, float]]) -> float:
    """
    Choose the weight for the next run, from what runs with other weights have spent.

    The spent share of the price is taken as a power of the weight: through the two runs nearest to
    the aim on the log scale or, while there is one, with an exponent of 1.2. The new weight is at
    most 8 times above or below the nearest.

    Args:
        tried: Weight and share of the price that it spent (1: all of it), at least one.
    """

    def log_spent(spent: float) -> float:
        return math.log(max(spent, 0.05))  # noise may make a gap negative: a small one then

    aim, slope = math.log(_AIM), 1.2
    near = sorted(tried, key=lambda one: abs(log_spent(one[1]) - aim))
    (weight, spent), others = near[0], near[1:]
    if others and others[0][0] != weight:
        rise = log_spent(others[0][1]) - log_spent(spent)
        slope = max(0.4, min(3.0, rise / math.log(others[0][0] / weight)))
    limit = math.log(8.0)
    return weight * math.exp(max(-limit, min(limit, (aim - log_spent(spent)) / slope)))


def _choosing(
    name: str, settings: FinetuneSettings, domains: Mapping[str, Sequence[Example]]
) -> dict[str, list[Encoded]]:
    """Encode the half of each domain's texts that chooses."""
    tokenizer = load_tokenizer(name, read_config(name))
    texts = {}
    for domain, examples in domains.items():
        choosing, judging = halves(examples, tokenizer, settings.max_length)
        if len(choosing) + len(judging) < _FEWEST and (examples or domain == "own"):
            raise DataError(
                f"{len(choosing) + len(judging)} held-out texts are too few to choose by some and "
                f"judge by the others; give {_FEWEST} or more, and better some hundred"
            )
        if choosing:
            texts[domain] = encode(choosing, tokenizer, settings.max_length)
    return texts


class _Costs(TrainerCallback):
    """Measures after a run's last step what texts cost its model; kept in its ``melinoe.json``."""

    def __init__(self, texts: Mapping[str, Sequence[Encoded]]) -> None:
        self.texts = texts
        self.costs: dict[str, Any] = {}
        names = [(k, one.input_ids, one.completion_mask) for k, v in texts.items() for one in v]
        self.digest = hashlib.sha256(repr(names).encode()).hexdigest()

    def attach(self, trainer: Any) -> None:
        """Meet the trainer, before the first step."""
        if trainer.is_fsdp_enabled:
            raise TrainingError(
                "a price cannot be kept with sharded weights, since the texts are read on each "
                "device; use data-parallel training without sharding, or set lambda_cache yourself"
            )
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == state.max_steps:
            self._measure()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == state.max_steps:  # resumed after the last step
            self._measure()

    def _measure(self) -> None:
        model = self.trainer.accelerator.unwrap_model(
            self.trainer.model_wrapped, keep_fp32_wrapper=True
        )
        for domain, texts in self.texts.items():
            self.costs[domain] = text_costs(model, texts, self.trainer.settings)

    def metadata(self) -> dict[str, Any]:
        return {"costs": {"texts_sha256": self.digest, **self.costs}}

    def of(self, run: Path) -> dict[str, Any]:
        """Costs of a run that ended now, or of one that an earlier call trained."""
        if self.costs:
            return self.costs
        found = read_metadata(run).get("costs") or {}
        if found.get("texts_sha256") != self.digest:
            raise TrainingError(
                f"{run} was not measured on these held-out texts; give those of the search that "
                "wrote it, or delete it"
            )
        return found


@torch.no_grad()
def text_costs(
    model: nn.Module, texts: Sequence[Encoded], settings: FinetuneSettings
) -> dict[str, list[float]]:
    """
    Measure each text's loss: ``nll``, summed over its completion in nats, and ``tokens``.

    Args:
        model: In any mode, which it is left in; with its updates on.
        texts: At least one with a completion.
        settings: ``batch_size`` and ``compute_dtype``.

    Raises:
        TrainingError: a loss is not finite.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    collate, order = Collator(0), sorted(range(len(texts)), key=lambda i: len(texts[i]))
    nll, tokens = [0.0] * len(texts), [0.0] * len(texts)
    narrow = settings.compute_dtype == "bfloat16"
    for start in range(0, len(order), settings.batch_size):
        rows = order[start : start + settings.batch_size]
        batch = {k: v.to(device) for k, v in collate([texts[i] for i in rows]).items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=narrow):
            logits = logits_of(model, model_outputs(model, batch))
        labels = batch["labels"][:, 1:]
        losses = nn.functional.cross_entropy(
            logits[:, :-1].float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
        )
        counts = (labels != IGNORED).sum(1)
        found = zip(rows, losses.double().sum(1).tolist(), counts.tolist(), strict=True)
        for row, loss, count in found:
            nll[row], tokens[row] = loss, float(count)
            if not math.isfinite(loss):
                why = broken_weight(model) or "lower learning_rate or lambda_cache"
                raise TrainingError(f"the loss of a held-out text is not finite: {why}")
    model.train(was_training)
    return {"nll": nll, "tokens": tokens}


def _spent(ours: Mapping[str, Any], theirs: Mapping[str, Any], price: Price) -> dict[str, Any]:
    """Shares of the price that a run spent: the largest of the domains, and one error above."""
    spent, at_most = [], []
    for domain, bound in price.bounds.items():
        (nll, tokens), (nll0, tokens0) = (
            (np.asarray(one[domain]["nll"]), np.asarray(one[domain]["tokens"]))
            for one in (ours, theirs)
        )
        gap = paired_difference(nll, nll0, tokens, tokens0, _LEVEL)
        spent.append(gap.mean / math.log1p(bound))
        at_most.append(gap.high / math.log1p(bound))
    worst = max(at_most)
    return {"spent": max(spent), "spent_at_most": worst, "feasible": worst <= 1}
