"""
Write a checkpoint with some of its experts alone, numbered anew: plain, in the base's own layout.

Routers lose the rows of the experts that go, so a token's choice is the best of those that stay.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from melinoe.checkpoint.files import read_raw_config
from melinoe.checkpoint.metadata import describe_base, read_metadata
from melinoe.checkpoint.opening import Checkpoint, build_on_meta, open_checkpoint
from melinoe.checkpoint.pack import write_anew
from melinoe.checkpoint.safetensors_file import load_whole
from melinoe.checkpoint.sources import Converted, group_by_parameter
from melinoe.checkpoint.writing import BASE_CARD, check_output, check_room
from melinoe.errors import UnsupportedModelError
from melinoe.moe.experts import EXPERT_COUNTS, TOP_K
from melinoe.moe.routing import find_routers

# The card, and the parts of melinoe.json, that speak of the model with all its experts.
_RENAMED = {"README.md": BASE_CARD}
_OF_THE_WHOLE = ("outcome", "fingerprint")


def prune(name: str, kept: Sequence[Sequence[int]], out: str | Path) -> None:
    """
    Write a checkpoint anew with the experts *kept* alone: of each MoE layer as many.

    Takes the largest stored tensor and about 1 GiB in memory. OutputExistsError, CheckpointError,
    WriteError: as `pack`. UnsupportedModelError: layers of different sizes, packed experts, routers
    that choose by groups of experts, or fewer experts than a token uses.
    """
    check_output(out)
    with open_checkpoint(name) as checkpoint:
        count, raw = len(kept[0]), read_raw_config(checkpoint.source)[1]
        config = _smaller(raw, checkpoint, count)
        stays = _what_stays(checkpoint, kept)
        check_room(out, checkpoint.stored_bytes)
        known = read_metadata(checkpoint.source) or describe_base(name)
        metadata = {key: value for key, value in known.items() if key not in _OF_THE_WHOLE}
        write_anew(checkpoint, out, _read(checkpoint, stays), config, metadata, _RENAMED)


def _smaller(raw: dict[str, Any], checkpoint: Checkpoint, count: int) -> dict[str, Any]:
    """Return the config with *count* experts, or refuse what could not run with them."""
    name, before = checkpoint.name, checkpoint.layers[0].num_experts
    if any(layer.num_experts != before for layer in checkpoint.layers):
        raise UnsupportedModelError(
            f"{name} has layers of different numbers of experts, which its config cannot say of "
            "fewer; leave it whole"
        )
    if any(not source.format.exact for source in checkpoint.experts):
        raise UnsupportedModelError(
            f"{name} holds its experts packed; write it with `melinoe pack --format plain` first"
        )

    def part(config: dict[str, Any]) -> dict[str, Any]:
        if (config.get("n_group") or 1) > 1:
            raise UnsupportedModelError(
                f"{name} chooses experts by groups of fixed size, which a smaller number would "
                "cut; leave it whole"
            )
        top_k = max((n for key in TOP_K if isinstance(n := config.get(key), int)), default=1)
        if count < top_k:
            raise UnsupportedModelError(
                f"each token uses {top_k} experts, and {count} would stay; keep {top_k} or more"
            )
        return {
            key: part(one) if isinstance(one, dict)
            else count if key in EXPERT_COUNTS and one == before
            else one
            for key, one in config.items()
        }  # fmt: skip

    return part(raw)


class _Stays(NamedTuple):
    """The part of a stored tensor that stays: *experts* along *axis*, all if those are None."""

    name: str  # to come
    experts: list[int] | None = None
    axis: int = 0


def _what_stays(checkpoint: Checkpoint, kept: Sequence[Sequence[int]]) -> dict[str, _Stays | None]:
    """Say of stored tensors, by name, what stays: None for nothing; of those not named, all."""
    found: dict[str, _Stays | None] = {}
    for source, layer in zip(checkpoint.experts, kept, strict=True):
        for reader in source.readers.values():
            for part in reader.parts:
                names = [place.name for place in part]
                if any(name in found for name in names):
                    raise UnsupportedModelError(
                        f"{checkpoint.name} has layers that share their experts; leave it whole"
                    )
                if not (reader.stacked or isinstance(reader, Converted)):  # one for each expert
                    found |= dict.fromkeys(names)
                    places = zip(names, sorted(layer), strict=False)
                    found |= {names[expert]: _Stays(new) for new, expert in places}
                else:
                    found |= {one: _Stays(one, sorted(layer)) for one in names}
    model = build_on_meta(checkpoint.model_class, checkpoint.config, checkpoint.dtype)
    groups = group_by_parameter(model, checkpoint.tensors)
    for router, layer in zip(find_routers(model), kept, strict=True):
        if router.num_logits != router.num_experts:
            raise UnsupportedModelError(
                f"{checkpoint.name} has routers with a choice that is no expert; leave it whole"
            )
        block, _, _ = router.name.rpartition(".")
        inside = model.get_submodule(block).state_dict(prefix=f"{block}.")
        for parameter, tensor in inside.items():
            # The router's own, and a correction of its scores that stands beside it.
            own = parameter.startswith(f"{router.name}.") or "." not in parameter[len(block) + 1 :]
            if own and parameter in groups and router.num_experts in tensor.shape:
                axis = list(tensor.shape).index(router.num_experts)
                for place in groups[parameter].places:
                    found[place.name] = _Stays(place.name, sorted(layer), axis)
    return found


def _read(checkpoint: Checkpoint, stays: dict[str, _Stays | None]) -> Iterator[dict[str, Tensor]]:
    for place in checkpoint.tensors.values():
        part = stays.get(place.name, _Stays(place.name))
        if part is not None:
            whole = load_whole(place)
            if part.experts is not None:
                whole = whole.index_select(part.axis, torch.tensor(part.experts))
            yield {part.name: whole}
