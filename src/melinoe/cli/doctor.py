"""`melinoe doctor`: say what a model is, what fits, and what other engines would read otherwise."""

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
    model: options.Model,
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
    name = models.resolve(model)
    if export:
        _show_export(name, reference, as_json)
        return
    from melinoe.checkpoint.verifying import verify as verify_files
    from melinoe.engine.budget import memory_of, slots_for
    from melinoe.host_memory import format_bytes, host_memory

    about = models.described(name)
    fast, verified = _fast_engine(name), None
    if verify:
        output.say("reading every byte")
        verified = verify_files(name)
    layers: Any = [
        SimpleNamespace(num_experts=experts, block_bytes=size) for experts, size in about.layers
    ]
    fits = [(budget, slots_for(budget, layers)) for budget in expert_memory or []]
    left = host_memory()
    if as_json:
        told = about.to_dict() | {"fast_engine": fast}
        told["budgets"] = [
            {"expert_memory": budget, "slots": slots, "bytes": memory_of(slots, layers)}
            for budget, slots in fits
        ]
        told["host_memory"] = None if left is None else left._asdict()
        output.show_json(told | ({} if verified is None else {"verified": verified._asdict()}))
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
        parts = {
            "files are what melinoe.json says": verified.recorded,
            "what the hub named them by": verified.named,
            "shards were read, and nobody recorded their sums": verified.unknown,
        }
        said = [f"{count} {words}" for words, count in parts.items() if count]
        said += ["the routers are those it was written for"] * verified.fingerprint
        rows["verified"] = "; ".join(said)
    output.show_table(model, [{"": key, " ": value} for key, value in rows.items()])


def _fast_engine(name: str) -> dict[str, str | None]:
    """Say why the device engine cannot run here, how it decodes, and why no cache is captured."""
    from importlib.util import find_spec

    if find_spec("triton") is None:
        said = "Triton is not installed"
        return {"cannot_run": said, "decoding": None, "not_captured": "not known without Triton"}
    import torch

    from melinoe.checkpoint.files import read_config
    from melinoe.checkpoint.opening import find_model_class
    from melinoe.engine.device.static_cache import why_not_static
    from melinoe.engine.device.support import grouped_mm_waits, why_not

    config, cannot, decoding = read_config(name), why_not(torch.device("cuda")), None
    if cannot is None:
        decoding = "decodes by grouped_mm in bfloat16, by kernels of ours in other types"
        if grouped_mm_waits(torch.cuda.get_device_capability(), torch.bfloat16):
            decoding = "decodes by kernels of ours, because grouped_mm waits for the host"
    static = why_not_static(find_model_class(config), config)
    return {"cannot_run": cannot, "decoding": decoding, "not_captured": static}


def _show_export(name: str, reference: Path | None, as_json: bool) -> None:
    """Print what other engines read otherwise, and write *reference* if one is asked for."""
    from melinoe.checkpoint.export_rules import find_export_faults

    found = find_export_faults(name)
    if reference is not None:
        from melinoe.checkpoint import load_tokenizer
        from melinoe.engine.load import load
        from melinoe.measure import write_json
        from melinoe.measure.reference import PROMPTS, reference_record

        loaded, _ = load(name, device="cpu")
        tokenizer = load_tokenizer(name, loaded.config)
        record = reference_record(loaded, tokenizer, name, PROMPTS, _REFERENCE_TOKENS)
        write_json(reference, record)
        output.say(f"wrote {reference}")
    if as_json:
        output.show_json({"model": name, "export": [one._asdict() for one in found]})
        return
    for one in found:
        change = "" if one.changes_results else " (no other results)"
        print(f"{one.engines}: {one.what}{change}: {one.why}")
    if not found:
        output.say(f"{name}: no rule is known by which another engine computes something else")
