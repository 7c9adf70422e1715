"""`melinoe doctor`: say what a model is, what fits, and what other engines would read otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import typer

from melinoe.cli import models, options, output
from melinoe.cli.command import option
from melinoe.config import QUARTER, experts_in_share

_REFERENCE_TOKENS = 32  # of each prompt, for another engine to compare with
_EXPORT = "Other engines"


def command(
    model: options.ModelOrConfig,
    expert_memory: Annotated[
        list[str] | None, option("Say what fits in this memory, as in 8GiB. Repeatable.")
    ] = None,
    verify: Annotated[
        bool, option("Also read every byte, and compare it with known checksums.", name="--verify")
    ] = False,
    export: Annotated[
        bool, option("Say what other engines would compute otherwise.", _EXPORT, name="--export")
    ] = False,
    reference: Annotated[
        Path | None,
        option("With --export: write tokens and log-probabilities to compare with.", _EXPORT),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Say what a model's experts weigh and what fits in memory; refuse what cannot be served."""
    if reference is not None and not export:
        raise typer.BadParameter("it belongs to --export", param_hint="--reference")
    if export and (expert_memory or verify):
        raise typer.BadParameter(
            "it takes neither --expert-memory nor --verify; ask for those without it",
            param_hint="--export",
        )
    output.quiet()
    asked = models.resolve(model)
    with _as_checkpoint(asked) as name:
        if export:
            _show_export(asked, name, reference, as_json)
            return
        about = _describe(asked, name)
        fast = _fast_engine(name)
        verified = None
        if verify:
            from melinoe.checkpoint.verifying import verify as verify_files

            output.say("reading every byte")
            verified = verify_files(name)
    _show(model, about, fast, verified, expert_memory or [], as_json)


def _show(
    model: str, about: Any, fast: dict[str, Any], verified: Any, budgets: list[str], as_json: bool
) -> None:
    from melinoe.engine.budget import memory_of, slots_for
    from melinoe.host_memory import format_bytes, host_memory

    layers: Any = [
        SimpleNamespace(num_experts=experts, block_bytes=size) for experts, size in about.layers
    ]
    fits = [(budget, slots_for(budget, layers)) for budget in budgets]
    left = host_memory()
    if as_json:
        told = about.to_dict() | {"fast_engine": fast}
        told["budgets"] = [
            {"expert_memory": budget, "slots": slots, "bytes": memory_of(slots, layers)}
            for budget, slots in fits
        ]
        told["host_memory"] = None if left is None else left._asdict()
        if verified is not None:
            told["verified"] = verified._asdict()
        output.show_json(told)
        return

    def size(slots: int) -> str:
        return format_bytes(memory_of(slots, layers))

    rows: dict[str, Any] = {
        "family": f"{about.model_type} ({about.architecture})",
        "weights": "present" if about.weights else "absent: from its config alone",
        "type": about.dtype,
        "experts stored": about.format,
        "MoE layers": about.moe_layers,
        "experts a layer": about.num_experts,
        "used by a token": about.top_k,
        "one expert": format_bytes(about.bytes_per_expert),
        "all experts": format_bytes(about.expert_bytes),
        "all else": format_bytes(about.backbone_bytes),
        "smallest budget": f"{size(1)} (one expert a layer)",
        "a quarter of the experts": size(experts_in_share(QUARTER, about.num_experts)),
    }
    for budget, slots in fits:
        rows[f"in {budget}"] = f"{slots} of {about.num_experts} experts a layer ({size(slots)})"
    if left is not None:
        rows["memory of this host"] = f"{format_bytes(left.free_bytes)} left ({left.limited_by})"
    rows["device engine"] = fast["cannot_run"] or f"runs here; {fast['decoding']}"
    rows["a cache to capture"] = fast["not_captured"] or "yes, a static one"
    if verified is not None:
        parts = [
            f"{verified.recorded} files are what melinoe.json says",
            f"{verified.named} what the hub named them by",
            f"{verified.unknown} shards were read, and nobody recorded their sums",
        ]
        said = [part for part in parts if not part.startswith("0 ")]
        said += ["the routers are those it was written for"] * verified.fingerprint
        rows["verified"] = "; ".join(said)
    output.show_table(model, [{"": name, " ": value} for name, value in rows.items()])


@contextmanager
def _as_checkpoint(model: str) -> Iterator[str]:
    """Give a checkpoint's name; of a config.json alone, that of a directory which holds only it."""
    from shutil import copyfile
    from tempfile import TemporaryDirectory

    from melinoe.checkpoint.files import read_object

    path = Path(model).expanduser()
    if not path.is_file():
        yield model
        return
    read_object(path)  # what is wrong with it is said of its own name
    with TemporaryDirectory() as alone:
        copyfile(path, Path(alone) / "config.json")
        yield alone


def _describe(model: str, name: str) -> Any:
    """Describe *name*, and call it as the user did; refuse what cannot be served."""
    from dataclasses import replace

    from melinoe.checkpoint import describe
    from melinoe.errors import UnsupportedModelError

    about = describe(name)
    if not about.supported:
        reason = about.reason or ""
        for place in (str(Path(name) / "config.json"), name):
            reason = reason.replace(place, model)
        raise UnsupportedModelError(reason)
    return replace(about, name=model)


def _fast_engine(name: str) -> dict[str, str | None]:
    """
    Say why the device engine cannot run here, why no cache can be captured, and how it decodes.

    The first two are None where nothing is in the way.
    """
    from importlib.util import find_spec

    if find_spec("triton") is None:
        return {
            "cannot_run": "Triton is not installed",
            "not_captured": "not known without it",
            "decoding": None,
        }
    import torch

    from melinoe.checkpoint.files import read_config
    from melinoe.checkpoint.opening import find_model_class
    from melinoe.engine.device.static_cache import why_not_static
    from melinoe.engine.device.support import grouped_mm_waits, why_not

    config, cannot = read_config(name), why_not(torch.device("cuda"))
    decoding = None
    if cannot is None:
        decoding = "decodes by grouped_mm in bfloat16, by kernels of ours in other types"
        if grouped_mm_waits(torch.cuda.get_device_capability(), torch.bfloat16):
            decoding = "decodes by kernels of ours, because grouped_mm waits for the host"
    return {
        "cannot_run": cannot,
        "decoding": decoding,
        "not_captured": why_not_static(find_model_class(config), config),
    }


def _show_export(model: str, name: str, reference: Path | None, as_json: bool) -> None:
    """Print what other engines read otherwise, and write *reference* if one is asked for."""
    from melinoe.checkpoint.export_rules import find_export_faults

    alone = name != model  # a config without a checkpoint lacks every other file
    found = [
        one._asdict() for one in find_export_faults(name) if not (alone and one.engines == "all")
    ]
    if reference is not None:
        from melinoe.checkpoint import load_model, load_tokenizer, open_checkpoint
        from melinoe.measure import write_json
        from melinoe.measure.reference import PROMPTS, reference_record

        with open_checkpoint(name) as checkpoint:
            tokenizer = load_tokenizer(name, checkpoint.config)
            loaded = load_model(checkpoint)
        record = reference_record(loaded, tokenizer, name, PROMPTS, _REFERENCE_TOKENS)
        write_json(reference, record)
        output.say(f"wrote {reference}")
    if as_json:
        output.show_json({"model": model, "export": found})
        return
    for one in found:
        change = "" if one["changes_results"] else " (no other results)"
        print(f"{one['engines']}: {one['what']}{change}: {one['why']}")
    if not found:
        output.say(f"{model}: no rule is known by which another engine computes something else")
