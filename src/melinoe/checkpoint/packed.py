"""
Read packed weights as they are stored: which tensors make one matrix, and which format they are.

A checkpoint of a quantised model keeps, for a matrix, codes and scales under names of their own.
Here each such set of stored tensors becomes one `PackedPlace`, under the name that the matrix would
have if it were plain. It can be read in two ways: as the parts of a block in a format of
`melinoe.experts`, or decoded, as the plain weights that it means. So the rest of the room handles a
packed checkpoint like any other; experts are read as blocks, all else is decoded.

A new way of packing is a `PackedPlace` and a `_Rule` in `_rules`.
"""

import re
from collections.abc import Callable, Iterator, Mapping
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

_MXFP4: Any = FORMATS["mxfp4"]
_FP8: Any = FORMATS["fp8"]


class Packing(NamedTuple):
    """
    Hold how a config says that weights are packed.

    Attributes:
        method: Its ``quant_method``, as ``fp8``.
        settings: Its ``quantization_config``.
    """

    method: str
    settings: Mapping[str, Any]


class PackedPlace:
    """
    Read matrices that a checkpoint holds packed: one, or one for each expert.

    Looks like a `Place` of plain weights: `read` decodes them.

    Args:
        name: Of the plain weights.
        stored: Stored tensors by what they hold: ``codes``, ``scales``, ...
        packed: Format of the block that `read_parts` gives.
        shape: ``(..., outputs, inputs)``.
        dtype: Type in which `read` is asked for plain weights.
        transposed: Whether the plain weights are ``(..., inputs, outputs)``.
    """

    def __init__(
        self,
        name: str,
        stored: Mapping[str, Place],
        packed: PackedFormat,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        transposed: bool = False,
    ) -> None:
        self.name, self.stored, self.format, self.transposed = name, stored, packed, transposed
        *self.count, self.rows, self.columns = shape
        if transposed:
            shape = (*self.count, self.columns, self.rows)
        self.info = TensorInfo(dtype, shape, 0, prod(shape) * dtype.itemsize)

    @property
    def file(self) -> SafetensorsFile:
        """Return the file of the codes."""
        return self.stored["codes"].file

    def read(self, into: Tensor, first: int = 0) -> None:
        """
        Decode whole matrices into *into*.

        Args:
            into: Takes the weights of one or more matrices.
            first: The first weight to read, at which a matrix begins.
        """
        size = self.rows * self.columns
        if first % size or into.numel() % size:
            raise ValueError(f"{first} and {into.numel()} are no whole matrices of {self.name}")
        kinds = self.format.matrix_parts(self.rows, self.columns)
        parts = {
            kind: torch.empty(shape, dtype=dtype, device="cpu")
            for kind, (shape, dtype) in kinds.items()
        }
        for index, plain in enumerate(into.reshape(-1, *into.shape[-2:]), start=first // size):
            self.read_parts(parts, index)
            matrix = self.format.decode_matrix(parts, self.rows, self.columns)
            plain.copy_(matrix.T if self.transposed else matrix)

    def read_parts(self, into: Mapping[str, Tensor], index: int = 0) -> None:
        """
        Read one matrix as parts of a block.

        Args:
            into: Contiguous CPU tensors by what they hold, as `PackedFormat.matrix_parts` lists
                them.
            index: Which of the matrices.
        """
        raise NotImplementedError

    def _check(self, kind: str, expected: tuple[int, ...]) -> None:
        """Refuse a stored tensor of another shape than the codes need."""
        place = self.stored[kind]
        if place.info.shape != expected:
            raise CheckpointError(
                f"{place.name} has shape {describe_shape(place.info.shape)} where "
                f"{self.stored['codes'].name} needs {describe_shape(expected)}; the two do not "
                "belong together, download the checkpoint again"
            )


# Where stored weights lie, as they are or packed.
Weights = Place | PackedPlace


class _Mxfp4Experts(PackedPlace):
    """Read gpt-oss: ``_blocks`` ``(E, outputs, inputs / 32, 16)``, ``_scales`` without the last."""

    def __init__(self, name: str, stored: Mapping[str, Place], dtype: torch.dtype) -> None:
        shape = stored["codes"].info.shape
        if len(shape) != 4 or shape[3] * 2 != GROUP:
            raise CheckpointError(
                f"{stored['codes'].name} has shape {describe_shape(shape)} where mxfp4 has experts "
                "x outputs x groups x 16 bytes; download the checkpoint again"
            )
        experts, rows, groups, _ = shape
        super().__init__(
            name, stored, _MXFP4, (experts, rows, groups * GROUP), dtype, transposed=True
        )
        self._check("scales", shape[:3])

    def read_parts(self, into: Mapping[str, Tensor], index: int = 0) -> None:
        """Read the expert's range of blocks and of scales; see `PackedPlace.read_parts`."""
        for kind in ("codes", "scales"):
            self.stored[kind].read(into[kind], index * into[kind].numel())


class _Fp8Matrix(PackedPlace):
    """Read FP8 codes with a scale for each square of 128 x 128, or one for the whole matrix."""

    def __init__(self, name: str, stored: Mapping[str, Place], dtype: torch.dtype) -> None:
        shape = stored["codes"].info.shape
        if stored["codes"].info.dtype != torch.float8_e4m3fn or len(shape) < 2:
            raise CheckpointError(
                f"{stored['codes'].name} has a scale, but is no float8_e4m3fn matrix, which is "
                "the one kind of fp8 that is read here; take a checkpoint of another kind"
            )
        super().__init__(name, stored, _FP8, shape, dtype)
        self._one_scale = prod(stored["scales"].info.shape) == prod(self.count)
        if not self._one_scale or (self.rows <= BLOCK and self.columns <= BLOCK):
            self._one_scale = False
            self._check("scales", (*self.count, -(-self.rows // BLOCK), -(-self.columns // BLOCK)))

    def read_parts(self, into: Mapping[str, Tensor], index: int = 0) -> None:
        """Read codes and scales; see `PackedPlace.read_parts`."""
        self.stored["codes"].read(into["codes"], index * into["codes"].numel())
        if not self._one_scale:
            self.stored["scales"].read(into["scales"], index * into["scales"].numel())
            return
        one = torch.empty((), dtype=torch.float32, device="cpu")
        self.stored["scales"].read(one, index)
        into["scales"].fill_(one)


class _GroupedIntegers(PackedPlace):
    """Read integer codes with a scale, and maybe a zero point, for each group of inputs."""

    def __init__(
        self,
        name: str,
        stored: Mapping[str, Place],
        dtype: torch.dtype,
        bits: int,
        group: int | None,
        shape: tuple[int, int],
    ) -> None:
        columns = shape[1]
        if columns % (group or columns) or columns * bits % 32:
            raise CheckpointError(
                f"{name} has {columns} inputs, which do not divide into groups of {group} and "
                "words of 32 bits; download the checkpoint again"
            )
        offset = "zero" if "zeros" in stored else "symmetric"
        packed = Integer(bits, group, offset, stored["scales"].info.dtype)
        super().__init__(name, stored, packed, shape, dtype)
        self.bits, self.groups = bits, columns // (group or columns)

    def _stored(self, kind: str) -> Tensor:
        """Read a whole stored tensor."""
        place = self.stored[kind]
        tensor = torch.empty(place.info.shape, dtype=place.info.dtype, device="cpu")
        place.read(tensor)
        return tensor

    def _unpacked(self, words: Tensor) -> Tensor:
        """Take the numbers out of int32 words, which hold some each along the last dimension."""
        found = words.contiguous().view(torch.uint8)
        if self.bits == 4:
            found = torch.stack([found & 15, found >> 4], dim=-1).flatten(-2)
        return found


class _CompressedTensors(_GroupedIntegers):
    """Read compressed-tensors: pack-quantized (int32 words) or int-quantized (int8 codes)."""

    def __init__(
        self,
        name: str,
        stored: Mapping[str, Place],
        dtype: torch.dtype,
        bits: int,
        group: int | None,
    ) -> None:
        info = stored["codes"].info
        self._in_words = info.dtype == torch.int32
        if len(info.shape) != 2 or not (self._in_words or info.dtype == torch.int8):
            raise CheckpointError(
                f"{stored['codes'].name} is neither a matrix of int32 words nor of int8 codes; "
                "download the checkpoint again"
            )
        rows, width = info.shape
        columns = width * 32 // bits if self._in_words else width
        super().__init__(name, stored, dtype, bits, group, (rows, columns))
        self._check("scales", (rows, self.groups))
        if "zeros" in stored:
            packed_rows = -(-rows * bits // 32) if self._in_words else rows
            self._check("zeros", (packed_rows, self.groups))

    def read_parts(self, into: Mapping[str, Tensor], index: int = 0) -> None:
        """Read codes and scales, and unpack zero points; see `PackedPlace.read_parts`."""
        codes = into["codes"]
        self.stored["codes"].read(codes.view(self.stored["codes"].info.dtype))
        if not self._in_words:
            codes.bitwise_xor_(128)  # int8 is stored with its sign, and held without
        self.stored["scales"].read(into["scales"])
        if "zeros" in self.stored:
            zeros = self._stored("zeros")
            zeros = self._unpacked(zeros.T).T if self._in_words else zeros.view(torch.uint8) ^ 128
            into["zeros"].copy_(zeros[: self.rows])


class _Gptq(_GroupedIntegers):
    """Read GPTQ: words of eight inputs ``(inputs / 8, outputs)``, zero points stored less one."""

    def __init__(
        self,
        name: str,
        stored: Mapping[str, Place],
        dtype: torch.dtype,
        bits: int,
        group: int | None,
        less: int,
    ) -> None:
        height, rows = _words(stored["codes"])
        super().__init__(name, stored, dtype, bits, group, (rows, height * 32 // bits))
        self._less, self._in_order = less, "order" not in stored
        self._check("scales", (self.groups, rows))
        self._check("zeros", (self.groups, rows * bits // 32))

    def read_parts(self, into: Mapping[str, Tensor], index: int = 0) -> None:
        """Turn words of inputs into rows of outputs; see `PackedPlace.read_parts`."""
        if not self._in_order:
            expected = torch.arange(self.columns, device="cpu") // (self.columns // self.groups)
            if not torch.equal(self._stored("order").to(expected.dtype), expected):
                raise CheckpointError(_ACT_ORDER.format(name=self.name))
            self._in_order = True
        into["codes"].copy_(self._stored("codes").T.contiguous().view(torch.uint8))
        into["scales"].copy_(self._stored("scales").T)
        into["zeros"].copy_((self._unpacked(self._stored("zeros")) + self._less).T)


class _Awq(_GroupedIntegers):
    """Read AWQ: words of eight outputs ``(inputs, outputs / 8)`` in an order of their own."""

    # Position in a word at which each of its eight outputs lies.
    _ORDER = (0, 4, 1, 5, 2, 6, 3, 7)

    def __init__(
        self, name: str, stored: Mapping[str, Place], dtype: torch.dtype, group: int | None
    ) -> None:
        columns, width = _words(stored["codes"])
        super().__init__(name, stored, dtype, 4, group, (width * 8, columns))
        self._check("scales", (self.groups, width * 8))
        self._check("zeros", (self.groups, width))

    def _outputs(self, kind: str) -> Tensor:
        """Unpack words that hold eight outputs each, as ``(outputs, ...)``."""
        numbers = self._unpacked(self._stored(kind)).unflatten(-1, (-1, 8))
        return numbers[..., list(self._ORDER)].flatten(-2).T

    def read_parts(self, into: Mapping[str, Tensor], index: int = 0) -> None:
        """Turn words of outputs into rows of inputs; see `PackedPlace.read_parts`."""
        into["codes"].copy_(pack_pairs(self._outputs("codes")))
        into["scales"].copy_(self._stored("scales").T)
        into["zeros"].copy_(self._outputs("zeros"))


class _OwnBlocks(PackedPlace):
    """Read the stacked parts of blocks that `melinoe.checkpoint.pack` writes."""

    def __init__(
        self,
        name: str,
        stored: Mapping[str, Place],
        dtype: torch.dtype,
        packed: PackedFormat,
        transposed: bool,
    ) -> None:
        experts, rows, width = stored["codes"].info.shape
        columns = width * 128 // packed.matrix_parts(1, 128)["codes"][0][1]
        super().__init__(name, stored, packed, (experts, rows, columns), dtype, transposed)
        for kind, (shape, _) in packed.matrix_parts(rows, columns).items():
            self._check(kind, (experts, *shape))

    def read_parts(self, into: Mapping[str, Tensor], index: int = 0) -> None:
        """Read the expert's range of each part; see `PackedPlace.read_parts`."""
        for kind, place in self.stored.items():
            place.read(into[kind], index * into[kind].numel())


def _words(place: Place) -> tuple[int, int]:
    if place.info.dtype != torch.int32 or len(place.info.shape) != 2:
        raise CheckpointError(
            f"{place.name} is no matrix of int32 words; download the checkpoint again"
        )
    first, second = place.info.shape
    return first, second


_ACT_ORDER = (
    "{name} was quantised by GPTQ in the order of activations (act-order, desc_act), whose groups "
    "are scattered over the inputs and are not read here; take a checkpoint without it"
)


# --- from a config to the places -----------------------------------------------------------------


_KEYS = ("quantization_config", "compression_config")


class _Rule(NamedTuple):
    """
    Name the stored tensors that make one packed matrix.

    Attributes:
        format: Of an expert's block; the scales' type may be another where they are stored.
        endings: What a stored tensor holds -> how its name ends; the scales tell that there is a
            matrix. With ``?`` it may be absent.
        plain: How the name of the plain weights ends.
        place: Makes the place of name, stored tensors and type.
        unused: Endings of tensors that only quantised activations need.
    """

    format: PackedFormat
    endings: Mapping[str, str]
    plain: str
    place: Callable[[str, Mapping[str, Place], torch.dtype], PackedPlace]
    unused: tuple[str, ...] = ()


def find_packing(config: Mapping[str, Any]) -> Packing | None:
    """
    Find the quantisation that a raw config, or any part of it, declares; None if there is none.

    Raises:
        CheckpointError: it names no method.
    """
    for key in _KEYS:
        if settings := config.get(key):
            method = settings.get("quant_method") if isinstance(settings, Mapping) else None
            return Packing(str(method or "of an unnamed kind"), settings)
    parts = (find_packing(part) for part in config.values() if isinstance(part, Mapping))
    return next((found for found in parts if found is not None), None)


def check_packing(packing: Packing, name: str) -> None:
    """
    Refuse a way of packing that is not read here.

    Raises:
        CheckpointError: the method is unknown, or its settings are malformed or not supported.
    """
    _rules(packing, name)


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a raw config as of plain weights."""
    return {
        key: plain_config(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _KEYS
    }


def expert_format(config: Mapping[str, Any], name: str, layer: str) -> ExpertFormat:
    """
    Tell from a raw config alone how the experts of *layer*, a module's full name, are stored.

    Raises:
        CheckpointError: as `check_packing`.
    """
    packing = find_packing(config)
    if packing is None:
        return PLAIN
    rules = _rules(packing, name)
    return PLAIN if _left_out(packing.settings, layer) else rules[0].format


def _left_out(settings: Mapping[str, Any], module: str) -> bool:
    """Whether a config leaves a module plain, or one that it lies in."""
    names = settings.get("modules_to_not_convert") or settings.get("ignore") or ()
    patterns = [
        name[3:] if name.startswith("re:")
        else rf"(|.*\.){re.escape(name).replace(chr(92) + '*', '[^.]*')}(\.|$)"
        for name in names
    ]  # fmt: skip
    return any([re.match(pattern, module) for pattern in patterns])  # all, for each to be checked


def unpack(
    stored: Mapping[str, Place], packing: Packing, name: str, dtype: torch.dtype
) -> dict[str, Any]:
    """
    Gather the stored tensors of each packed matrix under the name of its plain weights.

    Returns name -> place; tensors that are not packed stay as they are. Plain weights are given as
    *dtype*.

    Raises:
        CheckpointError: a scale or another part is missing, or has another shape than it should;
            no tensor is packed as the config says.
    """
    found: dict[str, Any] = dict(stored)
    count = 0
    for rule in _rules(packing, name):
        codes = rule.endings["codes"]
        for scales in [key for key in stored if key.endswith(rule.endings["scales"])]:
            base = scales.removesuffix(rule.endings["scales"])
            if base + codes not in stored:
                continue  # another rule's, or the model's parameter will be missed
            parts = dict(_gather(stored, base, rule))
            for place in parts.values():
                found.pop(place.name, None)
            found[base + rule.plain] = rule.place(base + rule.plain, parts, dtype)
            count += 1
        for key in [key for key in found if key.endswith(rule.unused)]:
            del found[key]
        for key in found:
            if codes not in ("", ".weight") and key.endswith(codes):
                raise CheckpointError(
                    f"{name} holds {key} without {key.removesuffix(codes)}"
                    f"{rule.endings['scales']}; a shard or a part of its index is missing, "
                    "download it again"
                )
    if not count:
        raise CheckpointError(
            f"{name} is quantised ({packing.method}) by its config, but holds no weights with "
            "scales; download the checkpoint again"
        )
    return found


def _gather(stored: Mapping[str, Place], base: str, rule: _Rule) -> Iterator[tuple[str, Place]]:
    """Find the stored tensors of one matrix by what they hold."""
    for kind, ending in rule.endings.items():
        if (place := stored.get(base + ending)) is not None:
            yield kind.removesuffix("?"), place
        elif not kind.endswith("?"):
            raise CheckpointError(
                f"{base}{rule.endings['codes']} needs {base}{ending}, which the checkpoint does "
                "not hold; a shard or a part of its index is missing, download it again"
            )


def _rules(packing: Packing, name: str) -> tuple[_Rule, ...]:
    """Look up the rules of a way of packing."""
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


def _mxfp4(settings: Mapping[str, Any]) -> tuple[_Rule, ...]:
    return (_Rule(_MXFP4, {"codes": "_blocks", "scales": "_scales"}, "", _Mxfp4Experts),)


def _fp8(settings: Mapping[str, Any]) -> tuple[_Rule, ...]:
    block = settings.get("weight_block_size")
    if block is not None and list(block) != [BLOCK, BLOCK]:
        raise CheckpointError(
            f"with scales for blocks of {block}, and blocks of {BLOCK} x {BLOCK} are read here; "
            "take another checkpoint of the model"
        )
    return (
        _Rule(
            _FP8, {"codes": "", "scales": "_scale_inv"}, "", _Fp8Matrix,
            (".input_scale", ".activation_scale"),
        ),
    )  # fmt: skip


def _compressed(settings: Mapping[str, Any]) -> tuple[_Rule, ...]:
    rules = []
    groups = list(settings["config_groups"].values())
    # First the group that names experts: a plan takes it for theirs.
    groups.sort(key=lambda group: not any("expert" in target for target in group["targets"]))
    for group in groups:
        weights, kind = group["weights"], group.get("format") or settings.get("format")
        strategy, bits = weights.get("strategy", "tensor"), weights["num_bits"]
        square = list(weights.get("block_structure") or ()) == [BLOCK, BLOCK]
        unused = (".input_scale", ".output_scale", ".input_zero_point")
        if kind in ("pack-quantized", "int-quantized", "naive-quantized") and (
            weights.get("type", "int") == "int" and bits in (4, 8) and strategy in _GROUPED
        ):
            size = _size(weights["group_size"]) if strategy == "group" else None
            packed = ".weight_packed" if kind == "pack-quantized" else ".weight"
            more = {} if weights.get("symmetric", True) else {"zeros": ".weight_zero_point"}
            offset = "zero" if more else "symmetric"
            endings = {"codes": packed, "scales": ".weight_scale"} | more
            endings |= {"order?": ".weight_g_idx", "shape?": ".weight_shape"}
            made = Integer(bits, size, offset)
            rules.append(_Rule(made, endings, ".weight", _compressed_place(bits, size), unused))
        elif (
            kind in ("float-quantized", "naive-quantized")
            and weights.get("type") == "float"
            and bits == 8
            and (strategy == "tensor" or (strategy == "block" and square))
        ):
            endings = {"codes": ".weight", "scales": ".weight_scale"}
            rules.append(_Rule(_FP8, endings, ".weight", _Fp8Matrix, unused))
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
    return tuple(rules)


_GROUPED = ("group", "channel")


def _compressed_place(bits: int, group: int | None) -> Callable[..., PackedPlace]:
    def place(name: str, stored: Mapping[str, Place], dtype: torch.dtype) -> PackedPlace:
        if "order" in stored:
            raise CheckpointError(_ACT_ORDER.format(name=name).replace("by GPTQ ", ""))
        return _CompressedTensors(name, stored, dtype, bits, group)

    return place


def _gptq(settings: Mapping[str, Any]) -> tuple[_Rule, ...]:
    bits, group = settings["bits"], _size(settings.get("group_size", 128))
    if settings.get("desc_act"):
        raise CheckpointError(
            "in the order of activations (act-order, desc_act), whose groups are scattered over "
            "the inputs and are not read here; take a checkpoint without it"
        )
    if bits not in (4, 8):
        raise CheckpointError(f"with {bits} bits, and 4 and 8 are read here; take another one")
    less = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
    endings = {"codes": ".qweight", "scales": ".scales", "zeros": ".qzeros", "order?": ".g_idx"}

    def place(name: str, stored: Mapping[str, Place], dtype: torch.dtype) -> PackedPlace:
        return _Gptq(name, stored, dtype, bits, group, less)

    return (_Rule(Integer(bits, group, "zero"), endings, ".weight", place),)


def _awq(settings: Mapping[str, Any]) -> tuple[_Rule, ...]:
    bits, group = (
        settings.get("bits", settings.get("w_bit", 4)),
        _size(settings.get("group_size", 128)),
    )
    version = str(settings.get("version", settings.get("format", "gemm"))).lower()
    if bits != 4 or version != "gemm" or not settings.get("zero_point", True):
        raise CheckpointError(
            f"with {bits} bits as {version}, and 4 bits as gemm with zero points are read here; "
            "take another checkpoint of the model"
        )

    def place(name: str, stored: Mapping[str, Place], dtype: torch.dtype) -> PackedPlace:
        return _Awq(name, stored, dtype, group)

    endings = {"codes": ".qweight", "scales": ".scales", "zeros": ".qzeros"}
    return (_Rule(Integer(4, group, "zero"), endings, ".weight", place),)


def _own(settings: Mapping[str, Any]) -> tuple[_Rule, ...]:
    packed: Any = named_format(settings["format"])
    transposed = bool(settings["transposed"])

    def place(name: str, stored: Mapping[str, Place], dtype: torch.dtype) -> PackedPlace:
        return _OwnBlocks(name, stored, dtype, packed, transposed)

    endings = {kind: f".{kind}" for kind in packed.matrix_parts(1, 128)}
    return (_Rule(packed, endings, "", place),)


def _size(value: Any) -> int | None:
    """Check a number of weights that share a scale; None for a whole output, written as -1."""
    if isinstance(value, bool) or not isinstance(value, int) or (value < 1 and value != -1):
        raise ValueError(f"{value!r} is no number of weights")
    return None if value == -1 else value


_METHODS: dict[str, Callable[[Mapping[str, Any]], tuple[_Rule, ...]]] = {
    "mxfp4": _mxfp4,
    "fp8": _fp8,
    "compressed-tensors": _compressed,
    "gptq": _gptq,
    "awq": _awq,
    OWN_METHOD: _own,
}
