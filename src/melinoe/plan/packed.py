"""
Count what quantised weights weigh, from a config's ``quantization_config`` alone.

A matrix of weights becomes codes of a few bits, a scale (and for some a zero point) for each group
of inputs, block or output, and at times an index. Which matrices are packed the config says, too:
all of the named class but those it leaves out; biases, norms, routers and tables stay as they are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from melinoe.errors import CheckpointError

# Bytes of a packed matrix from its outputs and inputs.
_Bytes = Callable[[int, int], float]


@dataclass(frozen=True)
class Packed:
    """
    How the weights of a checkpoint are packed.

    Attributes:
        words: The format and what is assumed of it, for people.
        experts_only: Whether nothing but experts is packed.
        left_out: Modules that are not, as the config names them.
        matrix_bytes: Bytes of a packed matrix from its outputs and inputs.
    """

    words: str
    matrix_bytes: _Bytes
    left_out: tuple[str, ...] = ("lm_head",)
    experts_only: bool = False

    def packs(self, module: str) -> bool:
        """Whether the module of that name is packed."""
        return not any(_names(pattern, module) for pattern in self.left_out)

    def expert_bytes(
        self, tensors: Mapping[str, tuple[int, ...]], itemsize: int, turned: bool
    ) -> int:
        """
        Bytes of one expert of one layer.

        Args:
            tensors: Shape of each of its tensors by name; what is no matrix stays as it is.
            itemsize: Bytes of an unpacked weight.
            turned: Whether matrices are held (inputs, outputs), not (outputs, inputs).
        """
        total = 0.0
        for name, shape in tensors.items():
            if len(shape) != 2:
                total += itemsize * math.prod(shape)
                continue
            outputs, inputs = shape[::-1] if turned else shape
            parts = 2 if "gate_up" in name else 1  # two matrices, which checkpoints keep apart
            total += parts * self.matrix_bytes(outputs // parts, inputs)
        return round(total)


def packing(config: Mapping[str, Any], name: str) -> Packed | None:
    """
    Tell how a raw config's weights are packed; None if they are not.

    Args:
        config: The contents of a ``config.json``.
        name: Of the model, for the sentence.

    Raises:
        CheckpointError: in a form that is not known here, or one that is malformed.
    """
    for key in ("quantization_config", "compression_config"):
        if settings := config.get(key):
            return _read(settings, name)
    parts = (packing(part, name) for part in config.values() if isinstance(part, Mapping))
    return next((found for found in parts if found is not None), None)


def unpacked(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same config without a word of packing, as of the weights once unpacked."""
    return {
        key: unpacked(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in ("quantization_config", "compression_config")
    }


def _read(settings: Any, name: str) -> Packed:
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    if not isinstance(method, str) or method not in _METHODS:
        raise CheckpointError(
            f"{name} is quantised ({method or 'in an unnamed form'}), and a plan knows "
            f"{', '.join(_METHODS)}; give --bits 8 or 4 to plan its weights stored so"
        )
    try:
        found = _METHODS[method](settings)
        found.packs("lm_head_"), found.matrix_bytes(1, 1)  # every pattern and figure is one
        return found
    except (LookupError, TypeError, ValueError, AttributeError, re.error) as error:
        raise CheckpointError(
            f"{name} is quantised ({method}), but its quantization_config is not readable "
            f"({type(error).__name__}: {error}); give --bits 8 or 4 to plan its weights stored so"
        ) from error


def _mxfp4(settings: Mapping[str, Any]) -> Packed:
    return Packed(
        "MXFP4: 17 bytes for 32 weights, which are 4-bit codes and an 8-bit scale",
        lambda outputs, inputs: outputs * math.ceil(inputs / 32) * 17,
        _left_out(settings, "modules_to_not_convert", "lm_head"),
        experts_only=True,
    )


def _fp8(settings: Mapping[str, Any]) -> Packed:
    left_out = _left_out(settings, "modules_to_not_convert", "lm_head")
    block = settings.get("weight_block_size")
    if block is None:
        return Packed("FP8: a byte a weight, and 4 for the scale of each matrix",
                      lambda outputs, inputs: outputs * inputs + 4, left_out)  # fmt: skip
    high, wide = (_positive(size) for size in block)
    return Packed(
        f"FP8: a byte a weight, and 4 for the scale of each block of {high} x {wide}",
        lambda outputs, inputs: (
            outputs * inputs + 4 * math.ceil(outputs / high) * math.ceil(inputs / wide)
        ),
        left_out,
    )


def _gptq(settings: Mapping[str, Any]) -> Packed:
    bits, group = _positive(settings["bits"]), settings.get("group_size", 128)
    codes = _grouped(bits, group, scale_bytes=2, zeros=True)
    return Packed(
        f"GPTQ: {bits}-bit codes, {_every(group)} a 16-bit scale and a {bits}-bit zero point, and "
        "4 bytes of index an input",
        lambda outputs, inputs: codes(outputs, inputs) + 4 * inputs,
    )


def _awq(settings: Mapping[str, Any]) -> Packed:
    bits, group = settings.get("bits", settings.get("w_bit", 4)), settings.get("group_size", 128)
    zeros = bool(settings.get("zero_point", True))
    return Packed(
        f"AWQ: {bits}-bit codes, {_every(group)} a 16-bit scale"
        + (f" and a {bits}-bit zero point" if zeros else ""),
        _grouped(_positive(bits), group, scale_bytes=2, zeros=zeros),
        _left_out(settings, "modules_to_not_convert", "lm_head"),
    )


def _bitsandbytes(settings: Mapping[str, Any]) -> Packed:
    left_out = _left_out(settings, "llm_int8_skip_modules", "lm_head")
    if settings.get("load_in_8bit"):
        return Packed("bitsandbytes: a byte a weight, and 4 for the scale of each output",
                      lambda outputs, inputs: outputs * inputs + 4 * outputs, left_out)  # fmt: skip
    twice = bool(settings.get("bnb_4bit_use_double_quant"))
    scale = 1 + 4 / 256 if twice else 4
    return Packed(
        "bitsandbytes: 4-bit codes, and for every 64 weights a "
        + ("scale of 8 bits, with 32 more for every 256 of those" if twice else "32-bit scale"),
        lambda outputs, inputs: outputs * inputs * (1 / 2 + scale / 64),
        left_out,
    )


def _compressed(settings: Mapping[str, Any]) -> Packed:
    groups = list(settings["config_groups"].values())
    # The experts': those of a pattern that names them, else of all linear layers.
    weights = next(
        (one for one in groups if any("expert" in t for t in one["targets"])), groups[0]
    )["weights"]
    bits, strategy = _positive(weights["num_bits"]), weights.get("strategy", "tensor")
    left_out = _left_out(settings, "ignore")
    zeros = not weights.get("symmetric", True)
    point = f" and a {bits}-bit zero point" if zeros else ""
    if strategy in ("group", "tensor_group"):
        group = _positive(weights["group_size"])
        # NVFP4 and MXFP4 have scales of a byte; integers in groups 16-bit ones.
        scale = 1 if re.search("nvfp4|mxfp4", str(settings.get("format"))) else 2
        return Packed(
            f"compressed-tensors: {bits}-bit codes, {_every(group)} a {8 * scale}-bit scale{point}",
            _grouped(bits, group, scale_bytes=scale, zeros=zeros),
            left_out,
        )
    if strategy == "block":
        high, wide = (_positive(size) for size in weights["block_structure"])
        return Packed(
            f"compressed-tensors: {bits}-bit codes, and a 16-bit scale for each block of "
            f"{high} x {wide}",
            lambda outputs, inputs: (
                outputs * inputs * bits / 8
                + 2 * math.ceil(outputs / high) * math.ceil(inputs / wide)
            ),
            left_out,
        )
    each = strategy == "channel"
    return Packed(
        f"compressed-tensors: {bits}-bit codes, and for each {'output' if each else 'matrix'} a "
        f"16-bit scale{point}",
        lambda outputs, inputs: (
            outputs * inputs * bits / 8 + (outputs if each else 1) * (2 + bits / 8 * zeros)
        ),
        left_out,
    )


_METHODS: dict[str, Callable[[Mapping[str, Any]], Packed]] = {
    "mxfp4": _mxfp4,
    "fp8": _fp8,
    "gptq": _gptq,
    "awq": _awq,
    "bitsandbytes": _bitsandbytes,
    "compressed-tensors": _compressed,
}


def _grouped(bits: int, group: int, *, scale_bytes: int, zeros: bool) -> _Bytes:
    """Codes, and a scale (and a zero point) for each group of inputs of each output."""
    if group != -1:
        _positive(group)

    def matrix(outputs: int, inputs: int) -> float:
        groups = 1 if group == -1 else math.ceil(inputs / group)
        return outputs * (inputs * bits / 8 + groups * (scale_bytes + bits / 8 * zeros))

    return matrix


def _every(group: int) -> str:
    return "for each output" if group == -1 else f"for every {group} weights"


def _positive(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{value!r} is no number of bits or weights")
    return value


def _left_out(settings: Mapping[str, Any], key: str, *more: str) -> tuple[str, ...]:
    given = settings.get(key) or ()
    return (*([given] if isinstance(given, str) else given), *more)


def _names(pattern: str, module: str) -> bool:
    """Whether a config's pattern names a module, or one that it lies in."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    parts = re.escape(pattern).replace(r"\*", "[^.]*")
    return re.search(rf"(^|\.){parts}(\.|$)", module) is not None
