"""Check that the books of a runtime agree, and that its slots hold what the books say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from melinoe.engine.store import Store, read_expert
from melinoe.errors import AttachError
from melinoe.moe.experts import ExpertsLayer


def audit(layers: Sequence[ExpertsLayer], caches: Sequence[Any], store: Store) -> int:
    """
    Compare every resident expert with the store; see `melinoe.engine.handle.Handle.audit`.

    Args:
        layers: in order.
        caches: of each layer: its ``residency``, and ``slots`` by parameter name.
        store: holds all experts.

    Returns:
        How many experts were compared.

    Raises:
        AttachError: they differ, or the books of a layer disagree.
    """
    compared = 0
    for layer, cache in zip(layers, caches, strict=True):
        compared += _audit_layer(layer, cache, store)
    return compared


def _audit_layer(layer: ExpertsLayer, cache: Any, store: Store) -> int:
    residency = cache.residency
    slot_of, expert_of = residency.slot_of, residency.expert_of
    resident = np.flatnonzero(slot_of >= 0)
    try:
        residency.check_invariants()
        books = len(resident) == int((expert_of >= 0).sum())
    except AssertionError:
        books = False
    if not (books and (expert_of[slot_of[resident]] == resident).all()):
        raise _fault(f"the books of {layer.name} disagree about which expert is in which slot")
    for expert in resident.tolist():
        slot = int(slot_of[expert])
        for name, kept in read_expert(layer, store, expert).items():
            if not torch.equal(_bits(cache.slots[name][slot].cpu()), _bits(kept)):
                raise _fault(
                    f"slot {slot} of {layer.name} is to hold expert {expert}, and its {name} is "
                    "not what the store holds"
                )
    return len(resident)


def _fault(what: str) -> AttachError:
    return AttachError(
        f"{what}; call reset_cache(), which empties the slots, and report how it came about"
    )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
