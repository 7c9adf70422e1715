"""Show what `melinoe doctor --export` finds; write its reference for another engine."""

from pathlib import Path

from melinoe.cli import options

NEW_TOKENS = 32


def show_export(model: str, name: str, reference: Path | None, as_json: bool) -> None:
    """Print what other engines read otherwise, and write *reference* if one is asked for."""
    from melinoe.checkpoint.export_rules import find_export_faults

    alone = name != model  # a config without a checkpoint lacks every other file
    found = [
        finding._asdict()
        for finding in find_export_faults(name)
        if not (alone and finding.engines == "all")
    ]
    if reference is not None:
        write_reference(name, reference)
    if as_json:
        options.show_json({"model": model, "export": found})
    elif found:
        for one in found:
            change = "" if one["changes_results"] else " (no other results)"
            print(f"{one['engines']}: {one['what']}{change}: {one['why']}")
    else:
        options.say(f"{model}: no rule is known by which another engine computes something else")


def write_reference(model: str, reference: Path) -> None:
    """Let the model, all experts resident, continue some prompts, and write what it said."""
    from melinoe.checkpoint import load_model, load_tokenizer, open_checkpoint
    from melinoe.measure import write_json
    from melinoe.measure.reference import PROMPTS, reference_record

    with open_checkpoint(model) as checkpoint:
        tokenizer = load_tokenizer(model, checkpoint.config)
        loaded = load_model(checkpoint)
    write_json(reference, reference_record(loaded, tokenizer, model, PROMPTS, NEW_TOKENS))
    options.say(f"wrote {reference}")
