"""
Fine-tune a checkpoint: examples in, a plain checkpoint in the hub's layout, and a log, out.

Beside a run *OUT* there may be *OUT*.control, and *OUT*.checkpoints until it is written.
"""

import gc
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainerCallback, TrainingArguments

from melinoe.checkpoint.backbone import load_backbone, load_model
from melinoe.checkpoint.files import split_revision
from melinoe.checkpoint.metadata import METADATA, read_metadata
from melinoe.checkpoint.opening import Checkpoint, open_checkpoint
from melinoe.checkpoint.safetensors_file import check_same
from melinoe.checkpoint.tokenizer import load_tokenizer
from melinoe.checkpoint.writing import (
    check_output,
    check_rewritable,
    check_room,
    copied_bytes,
    round_as_stored,
)
from melinoe.config import FinetuneSettings
from melinoe.config.names import version_of
from melinoe.data import Encoded, Example, count_losses, encode, load_examples, pad_token_id
from melinoe.errors import (
    BudgetError,
    CheckpointError,
    OutputExistsError,
    TrainingError,
    WriteError,
)
from melinoe.finetune.memory import Plan, describe, open_stream, plan_run, stored_layers
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
from melinoe.finetune.rows import rows_of
from melinoe.finetune.saving import write_result
from melinoe.finetune.stream import ExpertStream
from melinoe.finetune.trainer import Progress, sharding, training_arguments
from melinoe.finetune.training import train, with_compute_dtype
from melinoe.host_memory import check_host_room, format_bytes, free_host_bytes, parse_bytes
from melinoe.malloc import return_freed_memory
from melinoe.moe.routing import find_routers, fingerprint


@dataclass(frozen=True)
class FinetuneResult:
    """Result of a run."""

    out: Path  # directory of the fine-tuned checkpoint
    log: list[dict[str, Any]]  # terms over steps, as `LocalityTrainer.rows`
    metadata: dict[str, Any] = field(repr=False)  # what ``melinoe.json`` holds


def finetune(
    model_path: str | Path,
    data: str | Path | Sequence[Example],
    out: str | Path,
    settings: FinetuneSettings,
    *,
    eval_examples: Sequence[Example] | None = None,
    anchor_examples: Sequence[Example] | str | None = None,
    progress: Progress | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    resume: bool = False,
    gpu_memory: str | int | None = None,
    ram: str | int | None = None,
    say: Callable[[str], None] | None = None,
) -> FinetuneResult:
    """
    Fine-tune a checkpoint for locality and write the result: a plain checkpoint, or an adapter.

    With ``settings.control()`` the same call is the control: all the same but for the locality
    terms. With ``settings.plain()`` it trains on next tokens alone.

    Args:
        data, eval_examples: Examples, the first also as `load_examples` takes them; the latter are
            held out, and measured before and after.
        out: Directory to write; must not exist, or be empty.
        anchor_examples: Text of other kinds to replay, where ``settings.lambda_replay`` is above 0.
            Absent or ``"own"``: the base model writes it, ``settings.own_texts`` of them.
        progress, callbacks: Called with each log row and the ``steps`` to come to; of transformers.
        resume: Go on from the newest whole checkpoint in ``<out>.checkpoints``, if there is one. A
            result that was written already is read.
        gpu_memory, ram: What the run may take of the GPU, as in ``8GiB``, and of the host: its
            experts then wait in host memory, or on disk, and pass through. See docs/finetuning.md.
        say: Told, before a run within a budget, what it will take.

    Raises:
        OutputExistsError: *out* is taken; nothing was trained.
        DataError: unusable data.
        CheckpointError, TokenizerError: the model cannot be read, or was changed meanwhile.
        UnsupportedModelError: no experts, or routers that cannot be trained.
        TrainingError: settings that do not fit the model, a checkpoint of another run, or too many
            non-finite losses.
        InterruptedRunError: the run was asked to stop (Ctrl-C, SIGTERM), and can be resumed.
        BudgetError: the host has no memory for the run, or *gpu_memory* or *ram* is too small.
        WriteError: the result could not be written; what was trained is in the run's checkpoints.
        DependencyError: a tracker of ``settings.report_to`` is not installed.
    """
    path, name = check_place(out, resume), str(model_path)
    if (gpu_memory is not None or ram is not None) and (kind := sharding()):
        raise TrainingError(
            f"a sharded run ({kind}) keeps its experts on its devices; leave out --gpu-memory and "
            "--ram, or launch it without sharding"
        )
    written, checkpoints = is_written(path, resume), beside(path, "checkpoints")
    with open_checkpoint(name) as checkpoint:  # every shard is whole, before hours of work
        source = checkpoint.source  # of one commit, also where the branch moves meanwhile
        size, stored = checkpoint.stored_bytes, checkpoint.dtype
        if gpu_memory is None and ram is None:
            check_host_room(
                size,
                f"{format_bytes(size)} of weights",
                "train on a host with more, or say what it may take with --ram: the experts then "
                "stay on disk",
            )
        tokenizer = load_tokenizer(name, checkpoint.config)
    from_name = isinstance(data, (str, Path))
    examples = load_examples(data) if isinstance(data, (str, Path)) else list(data)
    encoded = encode(examples, tokenizer, settings.max_length)
    anchor = None
    if anchor_examples and not isinstance(anchor_examples, str):
        anchor = encode(anchor_examples, tokenizer, settings.max_length)
    if written:
        found = _finished_run(path, settings, encoded, anchor, source)
        remove_checkpoints(checkpoints)
        return FinetuneResult(path, found["log"], found)
    held_out = encode(eval_examples, tokenizer, settings.max_length) if eval_examples else None
    computed = with_compute_dtype(settings, stored)
    arguments = training_arguments(computed, checkpoints)  # joins the other processes
    main, several = arguments.process_index == 0, arguments.world_size > 1
    opened = open_checkpoint(source)
    with ExitStack() as stack:
        stack.callback(opened.close)
        stamps = opened.stamps
        model, stream, plan = _load(opened, encoded, computed, arguments, gpu_memory, ram)
        if stream is not None:
            stack.callback(stream.close)
            if say is not None and main:
                say(f"{plan}")
        if settings.save != "adapter":
            check_rewritable(model, opened)
            check_room(path, copied_bytes(opened))
        for router in find_routers(model) if several else ():
            # By FSDP's memory-saving way one process alone has read the checkpoint until the model
            # is sharded; the routers' fingerprint is needed before.
            for _, parameter in router.parameters():
                there = parameter.data.to(arguments.device)
                torch.distributed.broadcast(there, src=0)
                parameter.data.copy_(there)
        writes_anchor = settings.lambda_replay > 0 and anchor is None
        if writes_anchor:
            if stream is not None and say is not None and main:
                say(
                    "first the base model writes anchor text, and reads experts for each token; "
                    "text of your own (--anchor-data), or --lambda-replay 0, saves that"
                )
            with nullcontext() if stream is None else stream.attached(model):
                anchor = write_own_text(model, tokenizer, settings, arguments, encoded)
        return_freed_memory()  # of loading, and of the text that was written
        base_fingerprint = fingerprint(model)
        started = time.monotonic()
        if main:
            stack.callback(remove_if_empty, checkpoints)
        trained = train(
            model, encoded, computed, pad_token_id=pad_token_id(tokenizer), eval_data=held_out,
            anchor_data=anchor, own_text=writes_anchor, progress=progress, callbacks=callbacks,
            checkpoints=checkpoints, resume=resume, arguments=arguments, stream=stream,
        )  # fmt: skip
    metadata: dict[str, Any] = {}
    if main:
        with _telling_what_is_kept(checkpoints):
            if trained.sharded:  # a whole model takes what was trained
                with open_checkpoint(source) as checkpoint:
                    model = load_model(checkpoint)
                trained.adapter.apply(model)
            if settings.save != "adapter":
                with open_checkpoint(source) as checkpoint:
                    round_as_stored(model, checkpoint, trained.adapter.names())
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
            **({"streamed": describe(plan, stream)} if plan and stream else {}),
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
        with _telling_what_is_kept(checkpoints):
            if settings.save != "adapter":
                check_same(stamps)  # what did not change is copied from the base's files now
            write_result(
                model, source, path, metadata, settings.save, trained.adapter, stream is not None
            )
        remove_checkpoints(checkpoints)
        metadata["files"] = read_metadata(path)["files"]
    if several:
        torch.distributed.barrier()
    return FinetuneResult(path, trained.rows, metadata)


def _load(
    checkpoint: Checkpoint,
    data: Sequence[Encoded],
    settings: FinetuneSettings,
    arguments: TrainingArguments,
    gpu_memory: str | int | None,
    ram: str | int | None,
) -> tuple[Any, ExpertStream | None, Plan | None]:
    """Load the model, whole; or within a budget without its experts, with the stream of them."""
    if gpu_memory is None and ram is None:
        return load_model(checkpoint), None, None
    device = arguments.device
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", arguments.world_size))  # of this machine
    on_gpu = device.type == "cuda"
    if settings.gradient_checkpointing is False:
        raise TrainingError(
            "a run within a budget recomputes its layers; leave out --no-gradient-checkpointing"
        )
    if gpu_memory is not None and not on_gpu:
        raise BudgetError("--gpu-memory is for a GPU and there is none here; give --ram alone")
    model = load_backbone(checkpoint)
    _, rows = rows_of(data, settings, arguments.world_size)
    host = None if ram is None else parse_bytes(ram)
    if on_gpu:
        free, _ = torch.cuda.mem_get_info(device)
        budget = free * 9 // 10 if gpu_memory is None else parse_bytes(gpu_memory)
        host = (free_host_bytes() or 0) * 4 // 5 if host is None else host
    else:
        assert host is not None
        budget, host = host // processes, None
    plan = plan_run(
        model,
        stored_layers(checkpoint, model),
        checkpoint.backbone_bytes,
        settings,
        settings.batch_size * max(map(len, rows)),
        top_k=find_routers(model)[0].top_k or 1,
        budget_bytes=budget,
        host_bytes=host,
        on_gpu=on_gpu,
        processes=processes,
    )
    needed = (plan.memory.total - plan.memory.process - plan.memory.backbone) * processes
    if on_gpu:
        pinned = plan.store == "pinned"
        needed = plan.expert_bytes * pinned + plan.host_updates * processes
    check_host_room(
        needed,
        f"{format_bytes(needed)} of what training holds",
        "lower --ram, or train on a host with more",
    )
    model.to(device)
    return model, open_stream(checkpoint, model, plan, device, arguments.local_process_index), plan


def train_control(
    model_path: str | Path,
    data: str | Path | Sequence[Example],
    out: str | Path,
    settings: FinetuneSettings,
    **options: Any,
) -> Path:
    """Train the control of the run *out*, as `finetune` would, to an adapter beside it."""
    if settings.is_control:
        raise TrainingError(
            "the run has no locality terms, so it is its own control; compare it with nothing"
        )
    own = replace(settings.control(), save="adapter")
    return finetune(model_path, data, beside(out, "control"), own, **options).out


def leave() -> None:
    """Part from the other processes, at the end of all that is done together."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def beside(out: str | Path, what: str) -> Path:
    """Name a directory that belongs to the run *out*: ``<out>.<what>``."""
    path = Path(out).expanduser()
    return path.with_name(f"{path.name}.{what}")


def check_place(out: str | Path, resume: bool) -> Path:
    """Return the directory *out*; OutputExistsError if a run may not be written there."""
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
    base: str,
) -> dict[str, Any]:
    """Read the record of a written run; an error if it is not the run that is asked for."""
    metadata = dict(read_metadata(path))
    replayed = metadata.get("anchor") or {}
    with open_checkpoint(base) as checkpoint:
        ours = {
            "base model": fingerprint(load_backbone(checkpoint)),
            "data": data_fingerprint(data),
        }
    recorded = {"base model": metadata.get("base_fingerprint")}
    recorded["data"] = (metadata.get("data") or {}).get("tokens_sha256")
    if settings.lambda_replay:
        own = replayed.get("own_text", True)
        recorded["anchor text"] = "own" if own else replayed.get("tokens_sha256")
        ours["anchor text"] = "own" if anchor is None else data_fingerprint(anchor)
    recorded = {**(metadata.get("settings") or {}), **recorded}
    check_same_run(path, recorded, identity(settings, **ours), "delete it")
    return metadata


@contextmanager
def _telling_what_is_kept(checkpoints: Path) -> Iterator[None]:
    """Say beside an error in it (the base is gone, the disk is full) what is left of the run."""
    try:
        yield
    except (CheckpointError, WriteError) as error:
        if (newest := newest_checkpoint(checkpoints)) is None:
            raise
        state = read_state(newest)
        left = (
            f"what was trained is kept in {checkpoints}, and the same command with --resume "
            "writes it"
            if state["finished"]  # a disk that was full by then may have kept an earlier step alone
            else f"what was trained up to step {state['step']} is kept in {checkpoints}, and the "
            "same command with --resume goes on from there"
        )
        raise WriteError(f"{error}; {left}") from error
