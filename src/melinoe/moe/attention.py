"""Find the attention projections of a mixture-of-experts model, whatever its family calls them."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence

from torch import nn

from melinoe.errors import UnsupportedModelError
from melinoe.moe.experts import ExpertsLayer, family

log = logging.getLogger(__name__)

# Names of transformers' classes; "OlmoeAttention", "Qwen3NextGatedDeltaNet" (linear attention).
_ATTENTION_CLASS = re.compile(r"Attention|DeltaNet")


def find_attention(model: nn.Module, layers: Sequence[ExpertsLayer]) -> dict[str, nn.Linear]:
    """
    Find the linear projections of attention in the decoder layers: module by full name, in order.

    Decoder layers are the elements of the outermost list of modules around each experts module. One
    warning names projections that are no plain ``nn.Linear``, and layers without any.
    UnsupportedModelError if there are none.
    """
    found: dict[str, nn.Linear] = {}
    bare: set[str] = set()
    other: set[str] = set()
    for prefix, layer in _decoder_layers(model, layers):
        before = len(found)
        for name, module in _attention(prefix, layer):
            if type(module) is nn.Linear:
                found[name] = module
            elif isinstance(module, nn.Linear):
                other.add(type(module).__name__)
        if len(found) == before:
            bare.update(type(child).__name__ for child in layer.children())
    if not found:
        raise UnsupportedModelError(
            f"no attention projection is found in {family(model)}; train its routers and experts "
            "alone"
        )
    if bare or other:
        log.warning("attention updates leave out what is not plain linear attention in %s: %s",
                    family(model), ", ".join(sorted(bare | other)))  # fmt: skip
    return found


def _decoder_layers(
    model: nn.Module, layers: Sequence[ExpertsLayer]
) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of every element of the lists around the experts."""
    lists = {name: one for name, one in model.named_modules() if isinstance(one, nn.ModuleList)}
    holders = [[name for name in lists if x.name.startswith(f"{name}.")] for x in layers]
    for holder in dict.fromkeys(min(names, key=len) for names in holders if names):
        for number, element in enumerate(lists[holder]):
            yield f"{holder}.{number}", element


def _attention(prefix: str, layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a decoder layer that are within one whose class is named attention."""
    inside: set[str] = set()
    for name, module in layer.named_modules(prefix=prefix):
        parent = name.rpartition(".")[0]
        if parent in inside or (name != prefix and _ATTENTION_CLASS.search(type(module).__name__)):
            inside.add(name)
            yield name, module
