"""
Read packed weights as they are stored: which tensors make one matrix, and which format they are.

A quantised checkpoint keeps codes and scales under names of their own. Each such set of stored
tensors becomes one `PackedPlace` under the name that the matrix would have if it were plain. It
gives the parts of a block in a format of `melinoe.experts`, or the plain weights that they mean.
A new way of packing is a function that makes `_Rule`s, and a line in `_METHODS`.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from melinoe.checkpoint.safetensors_file import Place, SafetensorsFile, TensorInfo, describe_shape
from melinoe.errors import CheckpointError
from melinoe.experts.format import PLAIN, ExpertFormat, PackedFormat
from melinoe.experts.formats import FORMATS, named_format
from melinoe.experts.fp8 import BLOCK
from melinoe.experts.integer import Integer, pack_pairs
from melinoe.experts.mxfp4 import GROUP

# The ``quant_method`` of checkpoints that `melinoe.checkpoint.pack` writes.
OWN_METHOD = "melinoe"
SUMS = ".checksums"  # behind a layer's name: of the block of each expert
PACKING_KEYS = ("quantization_config", "compression_config")
_MXFP4: Any = FORMATS["mxfp4"]
_FP8: Any = FORMATS["fp8"]
# Position in a word at which each of AWQ's eight outputs lies.
_AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]
_ACT_ORDER = (
    "in the order of activations (act-order, desc_act), whose groups are scattered over the inputs "
    "and are not read here; take a checkpoint without it"
)

Stored = Mapping[str, Place]
Settings = Mapping[str, Any]


class PackedPlace:
    """
    Read matrices that a checkpoint holds packed, *shape* ``(..., outputs, inputs)``: one or one for
    each expert.

    Looks like a `Place` of plain weights, which `read` decodes, as *dtype*, and which are
    *transposed* where they are ``(..., inputs, outputs)``. *stored* is by what it holds: ``codes``,
    ``scales``, ...; *fill* reads the parts of one matrix, absent where they are ranges of it.
    """

    def __init__(
        self,
        name: str,
        stored: Stored,
        packed: PackedFormat,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        transposed: bool = False,
        fill: Callable[["PackedPlace", Mapping[str, Tensor], int], None] | None = None,
    ) -> None:
        self.name, self.stored, self.format, self.transposed = name, stored, packed, transposed
        *self.count, self.rows, self.columns = shape
        if transposed:
            shape = (*self.count, self.columns, self.rows)
        self.info = TensorInfo(dtype, shape, 0, prod(shape) * dtype.itemsize)
        self._fill = fill

    @property
    def file(self) -> SafetensorsFile:
        """Return the file of the codes."""
        return self.stored["codes"].file

    def read(self, into: Tensor, first: int = 0) -> None:
        """Decode whole matrices into *into*, beginning at the plain weight *first*."""
        size = self.rows * self.columns
        if first % size or into.numel() % size:
            raise ValueError(f"{first} and {into.numel()} are no whole matrices of {self.name}")
        parts = {
            kind: torch.empty(shape, dtype=dtype, device="cpu")
            for kind, (shape, dtype) in self.format.matrix_parts(self.rows, self.columns).items()
        }
        for index, plain in enumerate(into.reshape(-1, *into.shape[-2:]), start=first // size):
            self.read_parts(parts, index)
            matrix = self.format.decode_matrix(parts, self.rows, self.columns)
            plain.copy_(matrix.T if self.transposed else matrix)

    def read_parts(self, into: Mapping[str, Tensor], index: int = 0) -> None:
        """Read one matrix into the contiguous CPU tensors of a block's parts."""
        if self._fill is not None:
            self._fill(self, into, index)
            return
        for kind, part in into.items():
            self.stored[kind].read(part, index * part.numel())


Weights = Place | PackedPlace
"""Stored weights, as they are or packed."""


def _check(stored: Stored, kind: str, expected: tuple[int, ...]) -> None:
    """Refuse a stored tensor of another shape than the codes need."""
    place = stored[kind]
    if place.info.shape != expected:
        raise CheckpointError(
            f"{place.name} has shape {describe_shape(place.info.shape)} where "
            f"{stored['codes'].name} needs {describe_shape(expected)}; the two do not belong "
            "together, download the checkpoint again"
        )


# --- the ways of packing, each from its settings --------------------------------------------------


class _Rule(NamedTuple):
    """Name the stored tensors that make one packed matrix."""

    format: PackedFormat  # of an expert's block; the scales' type may be another where stored
    # What a stored tensor holds -> how its name ends; the scales tell that there is a matrix. With
    # ``?`` it may be absent.
    endings: Mapping[str, str]
    plain: str  # how the name of the plain weights ends
    place: Callable[[str, Stored, torch.dtype], PackedPlace]  # of name, stored tensors and type
    unused: tuple[str, ...] = ()  # endings of tensors that only quantised activations need


def _mxfp4(settings: Settings) -> list[_Rule]:
    def place(name: str, stored: Stored, dtype: torch.dtype) -> PackedPlace:
        shape = stored["codes"].info.shape
        if len(shape) != 4 or shape[3] * 2 != GROUP:
            raise CheckpointError(
                f"{stored['codes'].name} has shape {describe_shape(shape)} where mxfp4 has experts "
                "x outputs x groups x 16 bytes; download the checkpoint again"
            )
        experts, rows, groups, _ = shape
        _check(stored, "scales", shape[:3])
        return PackedPlace(name, stored, _MXFP4, (experts, rows, groups * GROUP), dtype, True)

    return [_Rule(_MXFP4, {"codes": "_blocks", "scales": "_scales"}, "", place)]


def _fp8_place(name: str, stored: Stored, dtype: torch.dtype) -> PackedPlace:
    """Read FP8 codes with a scale for each square of 128 x 128, or one for the whole matrix."""
    info, scales = stored["codes"].info, stored["scales"]
    if info.dtype != torch.float8_e4m3fn or len(info.shape) < 2:
        raise CheckpointError(
            f"{stored['codes'].name} has a scale, but is no float8_e4m3fn matrix, which is the one "
            "kind of fp8 that is read here; take a checkpoint of another kind"
        )
    *count, rows, columns = info.shape
    squares: tuple[int, ...] = (-(-rows // BLOCK), -(-columns // BLOCK))
    if one := prod(scales.info.shape) == prod(count):
        squares = ()
    else:
        _check(stored, "scales", (*count, *squares))

    def fill(place: PackedPlace, into: Mapping[str, Tensor], index: int) -> None:
        stored["codes"].read(into["codes"], index * into["codes"].numel())
        own = torch.empty(squares, dtype=torch.float32, device="cpu")
        scales.read(own, index * prod(squares))
        if not one:  # as often as the format has rows of scales in a square
            finer: Any = place.format
            own = own.repeat_interleave(BLOCK // finer.rows, 0)[: len(into["scales"])]
        into["scales"].copy_(own)

    return PackedPlace(name, stored, _FP8, info.shape, dtype, fill=fill)


def _fp8(settings: Settings) -> list[_Rule]:
    block = settings.get("weight_block_size")
    if block is not None and list(block) != [BLOCK, BLOCK]:
        raise CheckpointError(
            f"with scales for blocks of {block}, and blocks of {BLOCK} x {BLOCK} are read here; "
            "take another checkpoint of the model"
        )
    endings, unused = {"codes": "", "scales": "_scale_inv"}, (".input_scale", ".activation_scale")
    return [_Rule(_FP8, endings, "", _fp8_place, unused)]


def _grouped(
    name: str,
    stored: Stored,
    dtype: torch.dtype,
    bits: int,
    group: int | None,
    shape: tuple[int, int],
    fill: Callable[[PackedPlace, Mapping[str, Tensor], int], None],
    by_row: bool = False,
) -> PackedPlace:
    """Make the place of integer codes, with scales by row and group of inputs, or by group."""
    rows, columns = shape
    if columns % (group or columns) or columns * bits % 32:
        raise CheckpointError(
            f"{name} has {columns} inputs, which do not divide into groups of {group} and words of "
            "32 bits; download the checkpoint again"
        )
    groups = columns // (group or columns)
    words = -(-rows * bits // 32) if stored["codes"].info.dtype == torch.int32 else rows
    for kind, height in (("scales", rows), ("zeros", words)):
        if kind in stored:
            _check(stored, kind, (height, groups) if by_row else (groups, height))
    offset = "zero" if "zeros" in stored else "symmetric"
    packed = Integer(bits, group, offset, stored["scales"].info.dtype)
    return PackedPlace(name, stored, packed, shape, dtype, fill=fill)


def _numbers(words: Tensor, bits: int) -> Tensor:
    """Take the numbers out of int32 words, which hold some each along the last dimension."""
    found = words.contiguous().view(torch.uint8)
    return found if bits == 8 else torch.stack([found & 15, found >> 4], dim=-1).flatten(-2)


def _words(place: Place) -> tuple[int, int]:
    if place.info.dtype != torch.int32 or len(place.info.shape) != 2:
        raise CheckpointError(
            f"{place.name} is no matrix of int32 words; download the checkpoint again"
        )
    first, second = place.info.shape
    return first, second


def _compressed_place(
    bits: int, group: int | None, name: str, stored: Stored, dtype: torch.dtype
) -> PackedPlace:
    """Read compressed-tensors: pack-quantized (int32 words) or int-quantized (int8 codes)."""
    if "order" in stored:
        raise CheckpointError(f"{name} was quantised {_ACT_ORDER}")
    info = stored["codes"].info
    in_words = info.dtype == torch.int32
    if len(info.shape) != 2 or not (in_words or info.dtype == torch.int8):
        raise CheckpointError(
            f"{stored['codes'].name} is neither a matrix of int32 words nor of int8 codes; "
            "download the checkpoint again"
        )
    rows, width = info.shape

    def fill(place: PackedPlace, into: Mapping[str, Tensor], index: int) -> None:
        stored["codes"].read(into["codes"].view(info.dtype))
        if not in_words:
            into["codes"].bitwise_xor_(128)  # int8 is stored with its sign, and held without
        stored["scales"].read(into["scales"])
        if "zeros" in stored:
            zeros = stored["zeros"].load()
            zeros = _numbers(zeros.T, bits).T if in_words else zeros.view(torch.uint8) ^ 128
            into["zeros"].copy_(zeros[:rows])

    shape = (rows, width * 32 // bits if in_words else width)
    return _grouped(name, stored, dtype, bits, group, shape, fill, by_row=True)


def _compressed(settings: Settings) -> list[_Rule]:
    rules = []
    groups = list(settings["config_groups"].values())
    # First the group that names experts: a plan takes it for theirs.
    groups.sort(key=lambda group: not any("expert" in target for target in group["targets"]))
    for group in groups:
        weights, kind = group["weights"], group.get("format") or settings.get("format")
        strategy, bits = weights.get("strategy", "tensor"), weights["num_bits"]
        number = weights.get("type", "int"), bits
        square = list(weights.get("block_structure") or ()) == [BLOCK, BLOCK]
        unused = (".input_scale", ".output_scale", ".input_zero_point")
        endings = {"codes": ".weight", "scales": ".weight_scale"}
        whole = kind in ("pack-quantized", "int-quantized", "naive-quantized")
        floats = kind in ("float-quantized", "naive-quantized") and number == ("float", 8)
        if whole and number in (("int", 4), ("int", 8)) and strategy in ("group", "channel"):
            size = _size(weights["group_size"]) if strategy == "group" else None
            symmetric = weights.get("symmetric", True)
            endings |= {"order?": ".weight_g_idx", "shape?": ".weight_shape"}
            if kind == "pack-quantized":
                endings["codes"] = ".weight_packed"
            if not symmetric:
                endings["zeros"] = ".weight_zero_point"
            made = Integer(bits, size, "symmetric" if symmetric else "zero")
            place: Any = partial(_compressed_place, bits, size)
            rules.append(_Rule(made, endings, ".weight", place, unused))
        elif floats and (strategy == "tensor" or (strategy == "block" and square)):
            rules.append(_Rule(_FP8, endings, ".weight", _fp8_place, unused))
        else:
            raise CheckpointError(
                f"as {kind} with {bits} bits and a scale for each {strategy}, which is not read "
                "here; take another checkpoint of the model"
            )
    if not rules:
        raise ValueError("config_groups is empty")
    if len({rule.endings["codes"] for rule in rules}) != len(rules):
        raise CheckpointError(
            "with several settings for tensors of one name, which are not told apart here; take "
            "another checkpoint of the model"
        )
    return rules


def _gptq(settings: Settings) -> list[_Rule]:
    """Words of eight inputs ``(inputs / 8, outputs)``; zero points stored less one."""
    bits, group = settings["bits"], _size(settings.get("group_size", 128))
    if settings.get("desc_act"):
        raise CheckpointError(_ACT_ORDER)
    if bits not in (4, 8):
        raise CheckpointError(f"with {bits} bits, and 4 and 8 are read here; take another one")
    less = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
    endings = {"codes": ".qweight", "scales": ".scales", "zeros": ".qzeros", "order?": ".g_idx"}
    in_order: set[str] = set()  # matrices whose order was compared

    def fill(place: PackedPlace, into: Mapping[str, Tensor], index: int) -> None:
        stored = place.stored
        if "order" in stored and place.name not in in_order:
            expected = torch.arange(place.columns, device="cpu") // (group or place.columns)
            if not torch.equal(stored["order"].load().to(expected.dtype), expected):
                raise CheckpointError(f"{place.name} was quantised {_ACT_ORDER}")
            in_order.add(place.name)
        into["codes"].copy_(stored["codes"].load().T.contiguous().view(torch.uint8))
        into["scales"].copy_(stored["scales"].load().T)
        into["zeros"].copy_((_numbers(stored["zeros"].load(), bits) + less).T)

    def place(name: str, stored: Stored, dtype: torch.dtype) -> PackedPlace:
        height, rows = _words(stored["codes"])
        return _grouped(name, stored, dtype, bits, group, (rows, height * 32 // bits), fill)

    return [_Rule(Integer(bits, group, "zero"), endings, ".weight", place)]


def _awq(settings: Settings) -> list[_Rule]:
    """Words of eight outputs ``(inputs, outputs / 8)`` in an order of their own."""
    bits = settings.get("bits", settings.get("w_bit", 4))
    group = _size(settings.get("group_size", 128))
    version = str(settings.get("version", settings.get("format", "gemm"))).lower()
    if bits != 4 or version != "gemm" or not settings.get("zero_point", True):
        raise CheckpointError(
            f"with {bits} bits as {version}, and 4 bits as gemm with zero points are read here; "
            "take another checkpoint of the model"
        )

    def outputs(place: Place) -> Tensor:
        return _numbers(place.load(), 4).unflatten(-1, (-1, 8))[..., _AWQ_ORDER].flatten(-2).T

    def fill(place: PackedPlace, into: Mapping[str, Tensor], index: int) -> None:
        into["codes"].copy_(pack_pairs(outputs(place.stored["codes"])))
        into["scales"].copy_(place.stored["scales"].load().T)
        into["zeros"].copy_(outputs(place.stored["zeros"]))

    def place(name: str, stored: Stored, dtype: torch.dtype) -> PackedPlace:
        columns, width = _words(stored["codes"])
        return _grouped(name, stored, dtype, 4, group, (width * 8, columns), fill)

    endings = {"codes": ".qweight", "scales": ".scales", "zeros": ".qzeros"}
    return [_Rule(Integer(4, group, "zero"), endings, ".weight", place)]


def _own(settings: Settings) -> list[_Rule]:
    """Stacked parts of blocks, as `melinoe.checkpoint.pack` writes them."""
    packed: Any = named_format(settings["format"])
    transposed = bool(settings["transposed"])
    width_of_128 = packed.matrix_parts(1, 128)["codes"][0][1]

    def place(name: str, stored: Stored, dtype: torch.dtype) -> PackedPlace:
        experts, rows, width = stored["codes"].info.shape
        columns = width * 128 // width_of_128
        for kind, (shape, _) in packed.matrix_parts(rows, columns).items():
            _check(stored, kind, (experts, *shape))
        return PackedPlace(name, stored, packed, (experts, rows, columns), dtype, transposed)

    endings = {kind: f".{kind}" for kind in packed.matrix_parts(1, 128)}
    return [_Rule(packed, endings, "", place, (SUMS,))]


def _size(value: Any) -> int | None:
    """Check a number of weights that share a scale; None for a whole output, written as -1."""
    if isinstance(value, bool) or not isinstance(value, int) or (value < 1 and value != -1):
        raise ValueError(f"{value!r} is no number of weights")
    return None if value == -1 else value


_METHODS: dict[str, Callable[[Settings], list[_Rule]]] = {
    "mxfp4": _mxfp4,
    "fp8": _fp8,
    "compressed-tensors": _compressed,
    "gptq": _gptq,
    "awq": _awq,
    OWN_METHOD: _own,
}


# --- from a config to the places -----------------------------------------------------------------


def find_packing(config: Settings) -> tuple[str, Settings] | None:
    """Find the ``quant_method`` and settings that a raw config, or a part of it, declares."""
    for key in PACKING_KEYS:
        if settings := config.get(key):
            method = settings.get("quant_method") if isinstance(settings, Mapping) else None
            return str(method or "of an unnamed kind"), settings
    parts = (find_packing(part) for part in config.values() if isinstance(part, Mapping))
    return next((found for found in parts if found is not None), None)


def check_packing(config: Settings, name: str) -> list[_Rule]:
    """Look up the rules by which weights are packed; CheckpointError: none that are read here."""
    packing = find_packing(config)
    if packing is None:
        return []
    method, settings = packing
    if method not in _METHODS:
        raise CheckpointError(
            f"{name} is quantised ({method}), and {', '.join(_METHODS)} are read here; take "
            "another checkpoint of the model"
        )
    try:
        _left_out(settings, "")
        return _METHODS[method](settings)
    except CheckpointError as error:
        raise CheckpointError(f"{name} is quantised ({method}) {error}") from None
    except (LookupError, TypeError, ValueError, AttributeError, re.error) as error:
        raise CheckpointError(
            f"{name} is quantised ({method}), but its quantization_config is not readable "
            f"({type(error).__name__}: {error}); download config.json again"
        ) from None


def plain_config(config: Settings) -> dict[str, Any]:
    """Return a raw config as of plain weights."""
    return {
        key: plain_config(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in PACKING_KEYS
    }


def expert_format(config: Settings, name: str, layer: str) -> ExpertFormat:
    """Tell from a raw config alone how the experts of *layer*, a module's full name, are stored."""
    rules, packing = check_packing(config, name), find_packing(config)
    return PLAIN if packing is None or _left_out(packing[1], layer) else rules[0].format


def _left_out(settings: Settings, module: str) -> bool:
    """Whether a config leaves a module plain, or one that it lies in."""
    names = settings.get("modules_to_not_convert") or settings.get("ignore") or ()
    patterns = [
        name[3:] if name.startswith("re:")
        else rf"(|.*\.){re.escape(name).replace(chr(92) + '*', '[^.]*')}(\.|$)"
        for name in names
    ]  # fmt: skip
    return any([re.match(pattern, module) for pattern in patterns])  # all, for each to be checked


def unpack(stored: Stored, config: Settings, name: str, dtype: torch.dtype) -> dict[str, Weights]:
    """
    Gather the stored tensors of each packed matrix under the name of its plain weights.

    Packed weights are given as *dtype*; tensors that *config* does not say are packed stay.
    CheckpointError: a scale or another part is missing, or has another shape than it should; no
    tensor is packed as the config says.
    """
    found: dict[str, Any] = dict(stored)
    rules, count = check_packing(config, name), 0
    again = "a shard or a part of its index is missing, download it again"
    for rule in rules:
        codes, scales = rule.endings["codes"], rule.endings["scales"]
        for base in [key.removesuffix(scales) for key in stored if key.endswith(scales)]:
            if base + codes not in stored:
                continue  # another rule's, or the model's parameter will be missed
            parts = {}
            for kind, ending in rule.endings.items():
                if (place := stored.get(base + ending)) is not None:
                    parts[kind.removesuffix("?")] = place
                    found.pop(place.name, None)
                elif not kind.endswith("?"):
                    raise CheckpointError(
                        f"{base}{codes} needs {base}{ending}, which the checkpoint does not hold; "
                        f"{again}"
                    )
            found[base + rule.plain] = rule.place(base + rule.plain, parts, dtype)
            count += 1
        for key in [key for key in found if key.endswith(rule.unused)]:
            del found[key]
        for key in found:
            if codes not in ("", ".weight") and key.endswith(codes):
                raise CheckpointError(
                    f"{name} holds {key} without {key.removesuffix(codes)}{scales}; {again}"
                )
    if rules and not count:
        raise CheckpointError(
            f"{name} is quantised ({(find_packing(config) or '')[0]}) by its config, but holds no "
            "weights with scales; download the checkpoint again"
        )
    return found
