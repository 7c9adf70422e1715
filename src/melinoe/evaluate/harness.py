"""
Run tasks of the lm-evaluation-harness through its own Python API.

The harness asks a transformers model for log-likelihoods and completions; one that runs with few
resident experts answers like any other. It is an optional dependency and imported only here.
"""

import difflib
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from melinoe.errors import DataError, DependencyError, MelinoeError
from melinoe.evaluate.compare import Comparison, compare_scores
from melinoe.evaluate.perplexity import Floats
from melinoe.evaluate.scores import score_record
from melinoe.stats import Estimate


@dataclass(frozen=True)
class TaskScore:
    """
    One metric of one task, as the harness computed it.

    *per_example* has one number per example where the metric is their mean, else ``None``;
    *estimate* reaches 1.96 of the harness's standard errors to each side. *examples* are the
    harness's hashes of each example, in order.
    """

    model: str
    task: str
    metric: str
    per_example: Floats | None
    examples: tuple[str, ...]
    estimate: Estimate
    higher_is_better: bool | None
    versions: dict[str, Any]

    def to_record(self) -> dict[str, Any]:
        """Return the record of kind ``score``."""
        values = self.estimate if self.per_example is None else self.per_example
        about = {"how": "lm-evaluation-harness", "harness": self.versions}
        return score_record(values, self.model, self.task, self.metric, **about)

    def against(self, other: "TaskScore") -> Comparison | None:
        """
        Compare with *other* on the same task; ``None`` where the two cannot be paired.

        Raises:
            DataError: the two saw different examples.
        """
        if self.per_example is None or other.per_example is None or self.higher_is_better is None:
            return None
        if self.examples != other.examples:
            raise DataError(f"{self.task} was run on different examples; run both models again")
        names = (self.model, other.model, self.task, self.metric)
        lower = not self.higher_is_better
        return compare_scores(self.per_example, other.per_example, *names, lower_is_better=lower)


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    label: str,
    *,
    limit: int | None = None,
    task_path: str | Path | None = None,
    fewshot: int | None = None,
    chat_template: bool = False,
    batch_size: int = 8,
) -> list[TaskScore]:
    """
    Run tasks of the lm-evaluation-harness.

    Args:
        model: A causal language model, offloaded or not; *label* names it in records.
        tokenizer: Its tokenizer.
        tasks: Names of tasks or groups; ``*`` stands for any letters.
        limit: Only the first examples of each task; ``None`` takes all.
        task_path: A directory of further task files (YAML), looked at first.
        fewshot: Examples before each question; ``None`` leaves each task its own number.
        chat_template: Wrap prompts in the tokenizer's chat template.
        batch_size: Requests per forward pass.

    Returns:
        One score per task, metric and filter; for a group of tasks also the group's own.

    Raises:
        DependencyError: the harness is not installed.
        DataError: no such task, or one that cannot be run, as without its data set.
    """
    lm_eval, wrapper = _harness()
    manager, names = _find_tasks(tasks, task_path)
    wrapped = wrapper(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the harness's own making, not the user's
            results = lm_eval.simple_evaluate(
                wrapped,
                tasks=names,
                task_manager=manager,
                limit=limit,
                num_fewshot=fewshot,
                apply_chat_template=chat_template,
                bootstrap_iters=1000,
            )
    except MelinoeError:
        raise
    except Exception as error:  # data sets, templates and metrics fail in ways of their own
        text = str(error).strip()
        reason = text.splitlines()[0].rstrip(".") if text else type(error).__name__
        raise DataError(
            f"the harness could not run {', '.join(names)} ({reason}); check that the task's data "
            "set can be had here"
        ) from error
    return list(_scores(results, label, lm_eval.__version__))


def _harness() -> tuple[Any, Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import lm_eval
            from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise DependencyError(
            f"--tasks needs the lm-evaluation-harness ({error}); install it with: "
            "pip install 'melinoe[eval]'"
        ) from None
    # It says at length that a model was handed over ready-made, which is what we mean to do.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return lm_eval, HFLM


def _find_tasks(tasks: Sequence[str], task_path: str | Path | None) -> tuple[Any, list[str]]:
    """Return the harness's task manager, and the names of the tasks that were asked for."""
    from lm_eval.tasks import TaskManager

    if task_path is not None and not Path(task_path).is_dir():
        raise DataError(f"{task_path} is no directory; name one that holds task files (.yaml)")
    path = None if task_path is None else str(task_path)
    # The harness's own index of thousands of tasks takes many seconds to read.
    manager = TaskManager(include_path=path, include_defaults=path is None)
    if not all(manager.match_tasks([name]) for name in tasks):
        manager = TaskManager(include_path=path)
    for name in tasks:
        if not manager.match_tasks([name]):
            close = difflib.get_close_matches(name, manager.all_tasks, 3)
            hint = f"did you mean {', '.join(close)}?" if close else "`lm_eval ls tasks` lists them"
            raise DataError(f"the harness has no task {name!r}; {hint}")
    found = dict.fromkeys(one for name in tasks for one in manager.match_tasks([name]))
    return manager, list(found)


def _scores(results: Mapping[str, Any], label: str, version: str) -> Iterator[TaskScore]:
    for task, values in results["results"].items():
        samples = results["samples"].get(task, [])
        for key, value in values.items():
            metric, comma, chosen = key.partition(",")
            if isinstance(value, float) and not math.isfinite(value) and "_stderr" not in metric:
                raise DataError(
                    f"{metric} of {task} is not finite; `melinoe evaluate` without --tasks names "
                    "the layer and the tensor"
                )
            if not comma or metric.endswith("_stderr") or not _is_number(value):
                continue
            rows = [row for row in samples if row["filter"] == chosen and metric in row]
            numbers = [row[metric] for row in rows]
            per_example = _mean_of(numbers, float(value))
            count = len(rows) or int(values.get("sample_len") or 0)
            error = values.get(f"{metric}_stderr,{chosen}")
            reach = 1.96 * float(error) if _is_number(error) else 0.0
            yield TaskScore(
                label,
                task,
                metric if chosen == "none" else f"{metric} ({chosen})",
                per_example,
                tuple(row["doc_hash"] for row in rows),
                Estimate(float(value), float(value) - reach, float(value) + reach, count),
                results["higher_is_better"].get(task, {}).get(metric),
                {"lm_eval": version, "task": results["versions"].get(task)},
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and bool(np.isfinite(value))


def _mean_of(numbers: Sequence[Any], value: float) -> Floats | None:
    """Return the examples' own numbers, if their mean is the harness's value."""
    if not numbers or not all(_is_number(number) for number in numbers):
        return None
    found = np.asarray(numbers, dtype=np.float64)
    return found if np.isclose(found.mean(), value, rtol=1e-6, atol=1e-9) else None
