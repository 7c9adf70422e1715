"""
Fine-tune a checkpoint: examples in, a plain checkpoint in the hub's layout, and a log, out.

Beside a run *OUT* there may be *OUT*.teacher and *OUT*.control, the runs that it needs, and
*OUT*.checkpoints until it is written.
"""

import gc
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainerCallback

from melinoe.checkpoint.backbone import load_backbone, load_model
from melinoe.checkpoint.files import split_revision
from melinoe.checkpoint.metadata import METADATA, read_metadata
from melinoe.checkpoint.opening import open_checkpoint
from melinoe.checkpoint.safetensors_file import check_same
from melinoe.checkpoint.tokenizer import load_tokenizer
from melinoe.checkpoint.verifying import sum_of
from melinoe.checkpoint.writing import (
    check_output,
    check_rewritable,
    check_room,
    copied_bytes,
    round_as_stored,
)
from melinoe.config import PLAIN, FinetuneSettings
from melinoe.config.names import version_of
from melinoe.data import Encoded, Example, count_losses, encode, load_examples, pad_token_id
from melinoe.errors import CheckpointError, OutputExistsError, TrainingError, WriteError
from melinoe.finetune.adapter import WEIGHTS, place_of, read_teacher
from melinoe.finetune.own_text import write_own_text
from melinoe.finetune.resume import (
    check_same_run,
    data_fingerprint,
    identity,
    list_checkpoints,
    newest_checkpoint,
    read_state,
    remove_checkpoints,
    remove_if_empty,
)
from melinoe.finetune.saving import write_result
from melinoe.finetune.trainer import Progress, training_arguments
from melinoe.finetune.training import train, with_compute_dtype
from melinoe.host_memory import check_host_room, format_bytes
from melinoe.malloc import return_freed_memory
from melinoe.moe.routing import find_routers, fingerprint


@dataclass(frozen=True)
class FinetuneResult:
    """
    Result of a run.

    Attributes:
        out: Directory of the fine-tuned checkpoint.
        log: Rows of terms over steps; see `LocalityTrainer.rows`.
        metadata: What ``melinoe.json`` holds.
    """

    out: Path
    log: list[dict[str, Any]]
    metadata: dict[str, Any] = field(repr=False)


def finetune(
    model_path: str | Path,
    data: str | Path | Sequence[Example],
    out: str | Path,
    settings: FinetuneSettings,
    *,
    eval_examples: Sequence[Example] | None = None,
    anchor_examples: Sequence[Example] | str | None = None,
    teacher: str | Path | None = None,
    progress: Progress | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    resume: bool = False,
) -> FinetuneResult:
    """
    Fine-tune a checkpoint for locality and write the result: a plain checkpoint, or an adapter.

    With ``settings.control()`` the same call is the control: all the same but for the locality
    terms. With ``settings.plain()`` it trains on next tokens alone.

    Args:
        model_path: Checkpoint directory or hub name.
        data: Examples, or what `load_examples` takes.
        out: Directory to write; must not exist, or be empty.
        settings: Everything that decides the run.
        eval_examples: Held-out examples, measured before and after.
        anchor_examples: Text of other kinds whose quality the run should keep; replayed beside the
            data where ``settings.lambda_replay`` is above 0. Absent or ``"own"``: what the base
            model writes from an empty prompt, ``settings.own_texts`` of them.
        teacher: Whose hidden states ``lambda_match`` means: the directory of an adapter that an
            earlier run on the same base wrote (``save``); or ``"plain"``: the run on next tokens
            alone, trained first, in ``<out>.teacher``. ``None``: the base model's.
        progress: Called with each log row; ``steps`` in it is the number of steps to come to.
        callbacks: Of transformers' kind, run beside Melinoe's own.
        resume: Go on from the run's newest whole checkpoint, in ``<out>.checkpoints``; from the
            beginning if there is none. A result that was written already is read.

    Raises:
        OutputExistsError: *out* is taken; nothing was trained.
        DataError: unusable data.
        CheckpointError, TokenizerError: *model_path* or *teacher* cannot be read; or the model's
            files were changed while it trained.
        UnsupportedModelError: no experts, or routers that cannot be trained.
        TrainingError: settings that do not fit the model, a checkpoint of another run, or too many
            non-finite losses; what was trained before those is in the run's checkpoints.
        InterruptedRunError: the run was asked to stop (Ctrl-C, SIGTERM), and can be resumed.
        BudgetError: the host has no memory for the model's weights.
        WriteError: the result could not be written; what was trained is in the run's checkpoints.
        DependencyError: a tracker of ``settings.report_to`` is not installed.
    """
    path, name = check_place(out, resume), str(model_path)
    written = is_written(path, resume)
    if teacher == PLAIN and written:  # a teacher that was deleted is not missed
        teacher = beside(path, "teacher")
    elif teacher == PLAIN:
        teacher = train_teacher(
            model_path, data, path, settings, eval_examples=eval_examples,
            progress=progress, callbacks=callbacks, resume=resume,
        )  # fmt: skip
    checkpoints = beside(path, "checkpoints")
    with open_checkpoint(name) as checkpoint:  # every shard is whole, before hours of work
        source = checkpoint.source  # of one commit, also where the branch moves meanwhile
        size, stored = checkpoint.stored_bytes, checkpoint.dtype
        check_host_room(size, f"{format_bytes(size)} of weights", "train on a host with more")
        tokenizer = load_tokenizer(name, checkpoint.config)
    from_name = isinstance(data, (str, Path))
    examples = load_examples(data) if isinstance(data, (str, Path)) else list(data)
    encoded = encode(examples, tokenizer, settings.max_length)
    anchor = None
    if anchor_examples and not isinstance(anchor_examples, str):
        anchor = encode(anchor_examples, tokenizer, settings.max_length)
    if written:
        found = _finished_run(path, settings, encoded, anchor, teacher, source)
        remove_checkpoints(checkpoints)
        return FinetuneResult(path, found["log"], found)
    held_out = encode(eval_examples, tokenizer, settings.max_length) if eval_examples else None
    computed = with_compute_dtype(settings, stored)
    arguments = training_arguments(computed, checkpoints)  # joins the other processes
    main, several = arguments.process_index == 0, arguments.world_size > 1
    with open_checkpoint(source) as checkpoint:
        stamps = checkpoint.stamps
        model = load_model(checkpoint)
        if settings.save != "adapter":
            check_rewritable(model, checkpoint)
            check_room(path, copied_bytes(checkpoint))
    for router in find_routers(model) if several else ():
        # By FSDP's memory-saving way one process alone has read the checkpoint until the model is
        # sharded; the base routers are needed before.
        for _, parameter in router.parameters():
            there = parameter.data.to(arguments.device)
            torch.distributed.broadcast(there, src=0)
            parameter.data.copy_(there)
    writes_anchor = settings.lambda_replay > 0 and anchor is None
    if writes_anchor:
        anchor = write_own_text(model, tokenizer, settings, arguments, encoded)
    return_freed_memory()  # of loading, and of the text that was written
    base_fingerprint = fingerprint(model)
    taught_by = read_teacher(teacher, model) if teacher is not None else None
    started = time.monotonic()
    try:
        trained = train(
            model,
            encoded,
            computed,
            pad_token_id=pad_token_id(tokenizer),
            eval_data=held_out,
            anchor_data=anchor,
            own_text=writes_anchor,
            teacher=taught_by,
            progress=progress,
            callbacks=callbacks,
            keep_adapter=settings.save != "merged",
            checkpoints=checkpoints,
            resume=resume,
            arguments=arguments,
        )
    finally:
        if main:
            remove_if_empty(checkpoints)
    metadata: dict[str, Any] = {}
    if main:
        if trained.adapter is not None and trained.sharded:  # a whole model takes what it has
            with open_checkpoint(source) as checkpoint:
                model = load_model(checkpoint)
            trained.adapter.apply(model)
        if settings.save != "adapter":
            with open_checkpoint(source) as checkpoint:
                round_as_stored(model, checkpoint, trained.changed)
        metadata = {
            "base": name,
            "base_commit": split_revision(source)[1],
            "base_fingerprint": base_fingerprint,
            "fingerprint": fingerprint(model),
            "settings": asdict(settings),
            "is_control": settings.is_control,
            # The settings may leave them to the model's width.
            "learning_rates": {k: v for k, v in asdict(trained.rates).items() if k != "rank"},
            "lora_rank": trained.rates.rank,
            "compute_dtype": computed.compute_dtype,
            "teacher": taught_by and {"source": str(teacher), "fingerprint": taught_by.sha256},
            "anchor": None
            if anchor is None or not settings.lambda_replay
            else {
                "examples": len(anchor),
                "tokens_sha256": data_fingerprint(anchor),
                "own_text": writes_anchor,
            },
            "data": {
                "source": str(data) if from_name else None,
                "examples": len(encoded),
                **count_losses(examples, encoded),
                "tokens_sha256": data_fingerprint(encoded),
            },
            "log": trained.rows,
            "skipped_steps": trained.skipped_steps,
            "processes": trained.processes,
            "seconds": round(time.monotonic() - started, 1),
            "versions": {
                "melinoe": version_of("melinoe"),
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }
        gc.collect()  # the trainer is a circle, and holds the optimizer's state
        return_freed_memory()
        try:
            check_same(stamps)  # what did not change is copied from the base's files now
            write_result(
                model, source, path, metadata, settings.save, trained.changed, trained.adapter
            )
        except (CheckpointError, WriteError) as error:  # the base may be gone, or the disk full
            if left := _left(checkpoints):
                raise WriteError(f"{error}; {left}") from error
            raise
        remove_checkpoints(checkpoints)
        metadata["files"] = read_metadata(path)["files"]
    if several:
        torch.distributed.barrier()
    return FinetuneResult(path, trained.rows, metadata)


def train_control(
    model_path: str | Path,
    data: str | Path | Sequence[Example],
    out: str | Path,
    settings: FinetuneSettings,
    **options: Any,
) -> Path:
    """
    Train the control of the run *out* (`FinetuneSettings.control`), in ``<out>.control``.

    Args are those of `finetune` for the run itself: the same teacher and anchor text. Returns the
    directory, in which an adapter is.

    Raises:
        TrainingError: as `finetune`; or the run has no locality terms.
    """
    if settings.is_control:
        raise TrainingError(
            "the run has no locality terms, so it is its own control; compare it with nothing"
        )
    path, its_settings = beside(out, "control"), replace(settings.control(), save="adapter")
    return finetune(model_path, data, path, its_settings, **options).out


def train_teacher(
    model_path: str | Path,
    data: str | Path | Sequence[Example],
    out: str | Path,
    settings: FinetuneSettings,
    **options: Any,
) -> Path:
    """
    Train the teacher of the run *out* (`FinetuneSettings.plain`), in ``<out>.teacher``.

    Args are those of `finetune` for the run itself; anchor text is not used. Returns the directory,
    in which an adapter is.

    Raises:
        TrainingError: as `finetune`; or *settings* have no term that learns from a teacher.
    """
    options.pop("anchor_examples", None)
    if not settings.is_taught:
        raise TrainingError(
            "lambda_match is 0, so there is nothing to learn from a teacher; set lambda_match"
        )
    path, its_settings = beside(out, "teacher"), replace(settings.plain(), save="adapter")
    return finetune(model_path, data, path, its_settings, **options).out


def leave() -> None:
    """Part from the other processes, at the end of all that is done together."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def beside(out: str | Path, what: str) -> Path:
    """Name a directory that belongs to the run *out*: ``<out>.<what>``."""
    path = Path(out).expanduser()
    return path.with_name(f"{path.name}.{what}")


def check_place(out: str | Path, resume: bool) -> Path:
    """
    Return the directory *out*, if a run may be written there, or, to *resume*, one was.

    Raises:
        OutputExistsError: it is taken, or beside it are checkpoints of a run that did not end.
    """
    path, checkpoints = Path(out).expanduser(), beside(out, "checkpoints")
    if not resume and list_checkpoints(checkpoints):
        raise OutputExistsError(
            f"{checkpoints} holds checkpoints of a run that did not end; go on from them with "
            "--resume, or delete them"
        )
    return path if is_written(path, resume) else check_output(path)


def is_written(path: Path, resume: bool) -> bool:
    """Whether a resumed run's result is there: it appears whole, with its record, or not at all."""
    return resume and (path / METADATA).is_file()


def _finished_run(
    path: Path,
    settings: FinetuneSettings,
    data: Sequence[Encoded],
    anchor: Sequence[Encoded] | None,
    teacher: str | Path | None,
    base: str,
) -> dict[str, Any]:
    """Read the record of a written run; an error if it is not the run that is asked for."""
    metadata = dict(read_metadata(path))
    known, replayed = metadata.get("teacher") or {}, metadata.get("anchor") or {}
    with open_checkpoint(base) as checkpoint:
        routers = fingerprint(load_backbone(checkpoint))
    there, here = known.get("fingerprint"), None
    if teacher is not None and (file := place_of(teacher) / WEIGHTS).is_file():
        here = sum_of(file)["sha256"]
    elif teacher is not None:  # deleted since: its name has to do
        there, here = Path(known.get("source", "")).name, Path(teacher).name
    own = "own" if replayed.get("own_text", True) else replayed.get("tokens_sha256")
    theirs = {
        "data": (metadata.get("data") or {}).get("tokens_sha256"),
        "base model": metadata.get("base_fingerprint"),
        "teacher": there,
        "anchor text": own if settings.lambda_replay else None,
    }
    asked = "own" if anchor is None else data_fingerprint(anchor)
    ours = {
        "data": data_fingerprint(data),
        "base model": routers,
        "teacher": here,
        "anchor text": asked if settings.lambda_replay else None,
    }
    recorded = {**(metadata.get("settings") or {}), **theirs}
    check_same_run(path, recorded, identity(settings, **ours), "delete it")
    return metadata


def _left(checkpoints: Path) -> str | None:
    """Say what is left of a run whose result could not be written, and how to go on."""
    if (newest := newest_checkpoint(checkpoints)) is None:
        return None
    state = read_state(newest)
    return (
        f"what was trained is kept in {checkpoints}, and the same command with --resume writes it"
        if state["finished"]  # a disk that was full by then may have kept an earlier step alone
        else f"what was trained up to step {state['step']} is kept in {checkpoints}, and the same "
        "command with --resume goes on from there"
    )
