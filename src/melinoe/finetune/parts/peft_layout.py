"""
How PEFT lays out the two factors of an update of stacked weights, and what it calls them.

For a stack of *E* experts PEFT keeps two plain linear layers: ``lora_A`` of weight ``(E r, in)``,
experts outermost, and ``lora_B`` of weight ``(out, r E)``, experts **innermost**. Ours are
``(E, r, in)`` and ``(E, out, r)``. PEFT wraps a module once per updated parameter, the first one
innermost, so the last has its factors on the outermost wrapper and each before it one
``base_layer`` deeper.

Source:
    ``peft.tuners.lora.layer.ParamWrapper`` of PEFT 0.21; tests hold every rule here to it.
"""

from collections.abc import Iterator, Sequence

from torch import Tensor

PREFIX = "base_model.model."


def to_peft_A(lora_A: Tensor) -> Tensor:
    """``(E, r, in)`` to PEFT's ``(E r, in)``."""
    return lora_A.flatten(0, 1).contiguous()


def to_peft_B(lora_B: Tensor) -> Tensor:
    """``(E, out, r)`` to PEFT's ``(out, r E)``."""
    return lora_B.permute(1, 2, 0).flatten(1).contiguous()


def from_peft_A(weight: Tensor, num_experts: int) -> Tensor:
    """PEFT's ``(E r, in)`` to ``(E, r, in)``."""
    return weight.unflatten(0, (num_experts, -1)).contiguous()


def from_peft_B(weight: Tensor, num_experts: int) -> Tensor:
    """PEFT's ``(out, r E)`` to ``(E, out, r)``."""
    return weight.unflatten(1, (-1, num_experts)).permute(2, 0, 1).contiguous()


def factor_keys(experts_name: str, projections: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """
    Names in an adapter's file: ``(projection, key of lora_A, key of lora_B)`` for each.

    Args:
        experts_name: Of the experts module in the base model.
        projections: The updated parameters, in the module's own order.
    """
    for place, projection in enumerate(projections):
        depth = ".base_layer" * (len(projections) - 1 - place)
        stem = f"{PREFIX}{experts_name}{depth}"
        yield projection, f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


def linear_keys(name: str) -> tuple[str, str]:
    """Names in an adapter's file: keys of lora_A, ``(r, in)``, and lora_B of a linear module."""
    return f"{PREFIX}{name}.lora_A.weight", f"{PREFIX}{name}.lora_B.weight"
