"""`melinoe doctor`: say what a model is, what fits, and what other engines would read otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from melinoe.cli import models, options, output
from melinoe.cli.command import option

if TYPE_CHECKING:
    from melinoe.checkpoint import Description
    from melinoe.checkpoint.verifying import Verified

_REFERENCE_TOKENS = 32  # of each prompt, for another engine to compare with
_EXPORT = "Other engines"


def command(
    model: Annotated[
        str,
        typer.Argument(
            help="A checkpoint directory, a config.json, or a name on the hub; `tiny` is the model "
            "that ships."
        ),
    ],
    expert_memory: Annotated[
        list[str] | None, option("Say what fits in this memory, as in 8GiB. Repeatable.")
    ] = None,
    verify: Annotated[
        bool,
        option(
            "Also read every byte, and compare the files with the checksums in melinoe.json "
            "or the hub's cache.",
            name="--verify",
        ),
    ] = False,
    export: Annotated[
        bool,
        option("Say instead what other engines would compute otherwise.", _EXPORT, name="--export"),
    ] = False,
    reference: Annotated[
        Path | None,
        option(
            "With --export: write greedy tokens and log-probabilities of four prompts to this "
            "JSON file, to compare another engine with.",
            _EXPORT,
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Say what a model's experts weigh and what fits in memory; refuse what cannot be served."""
    from melinoe.engine.budget import memory_of, slots_for
    from melinoe.errors import UnsupportedModelError
    from melinoe.host_memory import format_bytes, host_memory

    output.quiet()
    asked = models.resolve(model)
    if reference is not None and not export:
        raise typer.BadParameter("it belongs to --export", param_hint="--reference")
    if export and (expert_memory or verify):
        raise typer.BadParameter("it takes neither --expert-memory nor --verify; ask for those "
                                 "without it", param_hint="--export")  # fmt: skip
    if export:
        with _as_checkpoint(asked) as name:
            _show_export(asked, name, reference, as_json)
        return
    with _as_checkpoint(asked) as name:
        about = _describe(asked, name)
        if not about.supported:
            raise UnsupportedModelError(about.reason)
        fast = _fast_engine(name)
        verified = _verify(name) if verify else None
    layers: Any = [
        SimpleNamespace(num_experts=experts, block_bytes=size) for experts, size in about.layers
    ]
    fits: list[dict[str, Any]] = []
    for budget in expert_memory or []:
        slots = slots_for(budget, layers)
        fits.append({"expert_memory": budget, "slots": slots, "bytes": memory_of(slots, layers)})
    left = host_memory()
    if as_json:
        host = None if left is None else left._asdict()
        output.show_json(
            about.to_dict()
            | {"budgets": fits, "fast_engine": fast, "host_memory": host}
            | ({} if verified is None else {"verified": verified._asdict()})
        )
        return
    rows: list[dict[str, Any]] = [
        {"": "family", " ": f"{about.model_type} ({about.architecture})"},
        {"": "weights", " ": "present" if about.weights else "absent: from its config alone"},
        {"": "type", " ": about.dtype},
        {"": "experts stored", " ": about.format},
        {"": "MoE layers", " ": about.moe_layers},
        {"": "experts a layer", " ": about.num_experts},
        {"": "used by a token", " ": about.top_k},
        {"": "one expert", " ": format_bytes(about.bytes_per_expert)},
        {"": "all experts", " ": format_bytes(about.expert_bytes)},
        {"": "all else", " ": format_bytes(about.backbone_bytes)},
    ]
    quarter = max(1, about.num_experts // 4)
    rows.append(
        {
            "": "smallest budget",
            " ": f"{format_bytes(memory_of(1, layers))} (one expert a layer)",
        }
    )
    rows.append({"": "a quarter of the experts", " ": format_bytes(memory_of(quarter, layers))})
    for fit in fits:
        rows.append(
            {
                "": f"in {fit['expert_memory']}",
                " ": f"{fit['slots']} of {about.num_experts} experts a layer "
                f"({format_bytes(fit['bytes'])})",
            }
        )
    if left is not None:
        words = f"{format_bytes(left.free_bytes)} left ({left.limited_by})"
        rows.append({"": "memory of this host", " ": words})
    rows += [
        {"": "fast engine", " ": fast["cannot_run"] or f"runs here; {fast['decoding']}"},
        {"": "a cache to capture", " ": fast["not_captured"] or "yes, a static one"},
    ]
    if verified is not None:
        rows.append({"": "verified", " ": _in_words(verified)})
    output.show_table(model, rows)


def _verify(name: str) -> Verified:
    from melinoe.checkpoint.verifying import verify

    output.say("reading every byte")
    return verify(name)


def _in_words(verified: Verified) -> str:
    parts = [
        f"{verified.recorded} files are what melinoe.json says",
        f"{verified.named} what the hub named them by",
        f"{verified.unknown} shards were read, and nobody recorded their sums",
    ]
    said = [part for part in parts if not part.startswith("0 ")]
    return "; ".join(
        [*said, *(["the routers are those it was written for"] * verified.fingerprint)]
    )


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


def _describe(model: str, name: str) -> Description:
    """Describe *name*, and call it as the user did."""
    from dataclasses import replace

    from melinoe.checkpoint import describe

    about = describe(name)
    if name == model:
        return about
    reason = about.reason
    for place in (str(Path(name) / "config.json"), name):
        reason = reason and reason.replace(place, model)
    return replace(about, name=model, reason=reason)


def _fast_engine(name: str) -> dict[str, str | None]:
    """
    Say why the fast engine cannot run here, why the model has no cache to capture, how it decodes.

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
        capability = torch.cuda.get_device_capability()
        decoding = "decodes by grouped_mm in bfloat16, by batched_mm in other types"
        if grouped_mm_waits(capability, torch.bfloat16):
            decoding = "decodes by batched_mm, because grouped_mm waits for the host on this GPU"
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
        finding._asdict()
        for finding in find_export_faults(name)
        if not (alone and finding.engines == "all")
    ]
    if reference is not None:
        _write_reference(name, reference)
    if as_json:
        output.show_json({"model": model, "export": found})
    elif found:
        for one in found:
            change = "" if one["changes_results"] else " (no other results)"
            print(f"{one['engines']}: {one['what']}{change}: {one['why']}")
    else:
        output.say(f"{model}: no rule is known by which another engine computes something else")


def _write_reference(model: str, reference: Path) -> None:
    """Let the model, all experts resident, continue some prompts, and write what it said."""
    from melinoe.checkpoint import load_model, load_tokenizer, open_checkpoint
    from melinoe.measure import write_json
    from melinoe.measure.reference import PROMPTS, reference_record

    with open_checkpoint(model) as checkpoint:
        tokenizer = load_tokenizer(model, checkpoint.config)
        loaded = load_model(checkpoint)
    write_json(reference, reference_record(loaded, tokenizer, model, PROMPTS, _REFERENCE_TOKENS))
    output.say(f"wrote {reference}")
