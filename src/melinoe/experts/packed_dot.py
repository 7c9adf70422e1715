"""
Products of packed rows with float32 vectors, and rows unpacked, compiled by numba.

A row's codes are read 32 at a time, widened in registers and multiplied; each group's sum is
scaled once. What is added to what depends on the row alone, so a row's product has the same bits in
whatever slot it lies, whatever else is computed with it, and by however many threads.

numba does not vectorise a sum in a fixed order, nor a table of 16 entries into a permutation of one
register, so the innermost loops are written as LLVM instructions on vectors. LLVM turns them into
what the processor has.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as _typed_intrinsic

from melinoe.experts.format import Arithmetic

# Vectors that are multiplied with a row while it is in registers.
BATCH = 4
# Rows that are fetched ahead.
AHEAD = 4
# Codes of a row that are read at once.
STEP = 32
# What the 16 codes of e2m1 mean: the highest bit is the sign.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# What those of int4 mean.
LEVELS = (-120, -97, -77, -59, -44, -30, -18, -6, 6, 18, 30, 44, 59, 77, 97, 120)
# Of the smallest scale of 8 bits, as a float32 has it.
SCALE_EXPONENT = 103
# Two codes to a byte: what they mean, exactly in bfloat16.
_TABLES = {"uint4": tuple(range(16)), "e2m1": E2M1, "levels": LEVELS}
_CODES = {name: number for number, name in enumerate((*_TABLES, "uint8", "e4m3"))}
_OFFSETS = {"none": 0, "minimum": 1, "zero": 2, "symmetric": 3}
_HOST = llvmlite.binding.get_host_cpu_features()

intrinsic: Any = _typed_intrinsic  # its type counts the compiler's own argument too

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_F32 = ir.FloatType()


def _vector(kind: Any, value: Any, width: int) -> ir.Constant:
    """A constant vector: of one number, or of a list of them."""
    values = list(value) if isinstance(value, list | tuple) else [value] * width
    return ir.Constant(ir.VectorType(kind, len(values)), values)


def _shuffle(b: Any, first: Any, second: Any, order: list[int]) -> Any:
    return b.shuffle_vector(first, second, _vector(_I32, order, 0))


def _splat(b: Any, value: Any, width: int) -> Any:
    """One number in all lanes."""
    empty = ir.Constant(ir.VectorType(value.type, width), ir.Undefined)
    return _shuffle(b, b.insert_element(empty, value, _I32(0)), empty, [0] * width)


def _look_up(b: Any, table: Any, index: Any) -> Any:
    """Take an entry of *table* for each lane; LLVM makes one permutation of it."""
    width = index.type.count
    found = ir.Constant(ir.VectorType(table.type.element, width), ir.Undefined)
    for lane in range(width):
        entry = b.extract_element(table, b.extract_element(index, _I32(lane)))
        found = b.insert_element(found, entry, _I32(lane))
    return found


def _load(b: Any, kind: Any, width: int, pointer: Any) -> Any:
    return b.load(b.bitcast(pointer, ir.VectorType(kind, width).as_pointer()), align=1)


def permutes_floats() -> bool:
    """Whether the processor takes 16 floats from one register by index."""
    return bool(_HOST.get("avx512f"))


def _lanes(step: int) -> int:
    """Numbers that are added up side by side, where *step* codes are read at once."""
    return min(16 if permutes_floats() else 8, step // 2)


def _bytes_of(codes: int, step: int) -> int:
    return step // 2 if codes < len(_TABLES) else step


def _shift_of(number: int) -> Any:
    """The bits by which a shift divides by *number*, a power of two."""
    return _I64(number.bit_length() - 1)


def _columns(codes: int, step: int) -> list[int]:
    """Columns of the *step* codes in the order in which `_widen` gives them."""
    name = list(_CODES)[codes]
    by_bytes = step == 32 and not permutes_floats()
    if name in _TABLES and by_bytes:  # as `_from_bytes` puts them
        return [
            16 * (vector // 2) + 4 * (lane % 4) + 2 * (vector % 2) + lane // 4
            for vector in range(4)
            for lane in range(8)
        ]
    apart = 2 if name in _TABLES or by_bytes else 1
    if name == "uint8" and by_bytes:
        apart = 4
    return [column for first in range(apart) for column in range(first, step, apart)]


def _widen(b: Any, codes: int, pointer: Any, step: int) -> list[Any]:
    """Vectors of `_lanes` float32 numbers from the *step* codes at *pointer*; of e4m3 / 256."""
    name, lanes = list(_CODES)[codes], _lanes(step)
    by_bytes = step == 32 and not permutes_floats()
    if name in _TABLES:
        if by_bytes:
            return _from_bytes(b, _TABLES[name], pointer)
        half = step // 2
        wide = b.zext(_load(b, _I8, half, pointer), ir.VectorType(_I32, half))
        halves = [b.and_(wide, _vector(_I32, 15, half)), b.lshr(wide, _vector(_I32, 4, half))]
        return [_look_up(b, _vector(_F32, _TABLES[name], 16), index) for index in halves]
    if name == "uint8":
        if by_bytes:  # those of a word one after the other: no byte crosses a register
            words = _load(b, _I32, 8, pointer)
            found = [b.lshr(words, _vector(_I32, 8 * place, 8)) for place in range(4)]
            found = [b.and_(one, _vector(_I32, 255, 8)) for one in found]
            return [b.sitofp(one, ir.VectorType(_F32, 8)) for one in found]
        whole = b.zext(_load(b, _I8, step, pointer), ir.VectorType(_I32, step))
        return _cut(b, b.sitofp(whole, ir.VectorType(_F32, step)), lanes)
    # The bits of e4m3 as those of a float16 that is 2**8 times smaller; also below normal.
    if by_bytes:
        both = _load(b, _I16, 16, pointer)
        words = [
            b.ashr(one, _vector(_I16, 1, 16)) for one in (b.shl(both, _vector(_I16, 8, 16)), both)
        ]
    else:
        whole = b.sext(_load(b, _I8, step, pointer), ir.VectorType(_I16, step))
        words = [b.shl(whole, _vector(_I16, 7, step))]
    found = []
    for one in words:
        count = one.type.count
        bits = b.and_(one, _vector(_I16, 0xBF80, count))
        halves = b.bitcast(bits, ir.VectorType(ir.HalfType(), count))
        found += _cut(b, b.fpext(halves, ir.VectorType(_F32, count)), lanes)
    return found


def _cut(b: Any, vector: Any, width: int) -> list[Any]:
    """Vectors of *width* from a longer one."""
    begins = range(0, vector.type.count, width)
    return [_shuffle(b, vector, vector, list(range(n, n + width))) for n in begins]


def _join(b: Any, vectors: list[Any]) -> Any:
    """One vector of several, whose number is a power of two."""
    while len(vectors) > 1:
        order = list(range(2 * vectors[0].type.count))
        vectors = [
            _shuffle(b, *two, order) for two in zip(vectors[::2], vectors[1::2], strict=True)
        ]
    return vectors[0]


def _from_bytes(b: Any, table: tuple[float, ...], pointer: Any) -> list[Any]:
    """Look 32 codes up as the upper two bytes of float32 numbers, and put those together."""
    pair = _load(b, _I64, 2, pointer)
    both = b.lshr(_shuffle(b, pair, pair, [0, 1, 0, 1]), _vector(_I64, [0, 0, 4, 4], 0))
    index = b.and_(b.bitcast(both, ir.VectorType(_I8, 32)), _vector(_I8, 15, 32))
    bits = np.array(table, np.float32).view(np.uint32) >> 16
    low, high = (
        _look_up_bytes(b, [int(one) for one in part], index) for part in (bits & 255, bits >> 8)
    )

    found = []
    for begin in (0, 8):  # words of two bytes: of each half the first, then the rest
        order = [
            half + begin + place + second
            for half in (0, 16)
            for place in range(8)
            for second in (0, 32)
        ]
        words = b.bitcast(_shuffle(b, low, high, order), ir.VectorType(_I32, 8))
        found.append(b.shl(words, _vector(_I32, 16, 8)))
        found.append(b.and_(words, _vector(_I32, 0xFFFF0000, 8)))
    return [b.bitcast(words, ir.VectorType(_F32, 8)) for words in found]


def _look_up_bytes(b: Any, table: list[int], index: Any) -> Any:
    """Take one of 16 bytes for each of 32 lanes."""
    if _HOST.get("avx2"):
        whole = index.type
        function = cgutils.get_or_insert_function(
            b.module, ir.FunctionType(whole, [whole] * 2), "llvm.x86.avx2.pshuf.b"
        )
        return b.call(function, [_vector(_I8, table * 2, 0), index])
    return _join(b, [_look_up(b, _vector(_I8, table, 0), half) for half in _cut(b, index, 16)])


def _loop(
    b: Any, count: Any, carried: list[Any], body: Callable[[Any, list[Any]], list[Any]]
) -> Any:
    """Repeat *body* for 0 to *count* - 1, at least once, with values carried; returns the last."""
    entry, block = b.block, b.append_basic_block("loop")
    done = b.append_basic_block("done")
    b.branch(block)
    b.position_at_end(block)
    number = b.phi(_I64)
    number.add_incoming(_I64(0), entry)
    phis = []
    for value in carried:
        phi = b.phi(value.type)
        phi.add_incoming(value, entry)
        phis.append(phi)
    values = body(number, phis)
    following = b.add(number, _I64(1))
    for phi, value in zip([number, *phis], [following, *values], strict=True):
        phi.add_incoming(value, b.block)
    b.cbranch(b.icmp_signed("<", following, count), block, done)
    b.position_at_end(done)
    return values


@intrinsic(prefer_literal=True)
def _dot(  # type: ignore[no-untyped-def]
    context, codes, offsets, group, batch, groups, row, ahead, scale, shift, wide, xs, out
):
    """
    Multiply one packed row with *batch* vectors, all by address, and fetch what lies *ahead* bytes.
    *scale* is float32 ``(groups,)``, *shift* ``(wide * lanes,)``: the same, then zeros; *xs* lists
    the addresses of the vectors, then of the sums of their groups, then zeros.
    """
    kind, shifted, size = codes.literal_value, offsets.literal_value, group.literal_value
    many, step = batch.literal_value, min(size, STEP)
    read = _bytes_of(kind, step)

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        lanes = _lanes(step)
        count, row, ahead, scale, shift, ends, inputs, into = args[4:]
        floats = ir.VectorType(_F32, lanes)
        fma = cgutils.get_or_insert_function(
            b.module, ir.FunctionType(floats, [floats] * 3), f"llvm.fmuladd.v{lanes}f32"
        )
        fetch = b.module.declare_intrinsic(
            "llvm.prefetch",
            [_I8.as_pointer()],
            ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32]),
        )
        row = b.inttoptr(row, _I8.as_pointer())
        scale, shift, into = (b.inttoptr(one, _F32.as_pointer()) for one in (scale, shift, into))
        inputs = b.inttoptr(inputs, _I64.as_pointer())
        addresses = [b.load(b.gep(inputs, [_I64(n)])) for n in range(2 * many)]
        vectors = [b.inttoptr(address, _F32.as_pointer()) for address in addresses]
        shared = _shift_of(size // step)

        def add_step(number: Any, before: list[Any]) -> list[Any]:
            here = b.gep(row, [b.mul(number, _I64(read))])
            if read >= 16:
                b.call(fetch, [b.gep(here, [ahead]), _I32(0), _I32(3), _I32(1)])
            weights = _widen(b, kind, here, step)
            factor = _splat(b, b.load(b.gep(scale, [b.lshr(number, shared)])), lanes)
            found, at = [], b.mul(number, _I64(step))
            for x, sum_before in zip(vectors[:many], before, strict=True):
                places = [b.gep(x, [b.add(at, _I64(n))]) for n in range(0, step, lanes)]
                total = b.fmul(weights[0], _load(b, _F32, lanes, places[0]))
                for weight, place in zip(weights[1:], places[1:], strict=True):
                    total = b.call(fma, [weight, _load(b, _F32, lanes, place), total])
                found.append(b.call(fma, [factor, total, sum_before]))
            return found

        def add_shift(number: Any, before: list[Any]) -> list[Any]:
            at = b.mul(number, _I64(lanes))
            own = _load(b, _F32, lanes, b.gep(shift, [at]))
            sums_of = [_load(b, _F32, lanes, b.gep(x, [at])) for x in vectors[many:]]
            return [b.call(fma, [own, *both]) for both in zip(sums_of, before, strict=True)]

        zero = _vector(_F32, 0.0, lanes)
        totals = _loop(b, b.shl(count, shared), [zero] * many, add_step)
        if shifted:
            totals = _loop(b, ends, totals, add_shift)
        for place, total in enumerate(totals):
            half = lanes // 2
            while half:
                low = _shuffle(b, total, total, list(range(half)))
                high = _shuffle(b, total, total, list(range(half, 2 * half)))
                total, half = b.fadd(low, high), half // 2
            b.store(b.extract_element(total, _I32(0)), b.gep(into, [_I64(place)]))
        return context.get_dummy_value()

    numbers = (types.int64,) * 8
    return types.void(codes, offsets, group, batch, *numbers), generate


@intrinsic(prefer_literal=True)
def _unpack(  # type: ignore[no-untyped-def]
    context, codes, offsets, group, half, groups, row, scale, shift, out
):
    """Write the weights of one packed row to *out*: as bfloat16 if *half*, else as float32."""
    kind, shifted, short = codes.literal_value, offsets.literal_value, half.literal_value
    size = group.literal_value
    step = min(size, STEP)
    read = _bytes_of(kind, step)

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        columns = _columns(kind, step)
        count, row, scale, shift, into = args[4:]
        row, into = (b.inttoptr(address, _I8.as_pointer()) for address in (row, into))
        scale, shift = (b.inttoptr(address, _F32.as_pointer()) for address in (scale, shift))
        shared = _shift_of(size // step)

        def write_step(number: Any, _: list[Any]) -> list[Any]:
            at = b.lshr(number, shared)
            value = _join(b, _widen(b, kind, b.gep(row, [b.mul(number, _I64(read))]), step))
            value = _shuffle(b, value, value, sorted(range(step), key=columns.__getitem__))
            value = b.fmul(value, _splat(b, b.load(b.gep(scale, [at])), step))
            if shifted:
                value = b.fadd(value, _splat(b, b.load(b.gep(shift, [at])), step))
            if short:
                value = _to_bfloat16(b, value, step)
            target = b.gep(into, [b.mul(number, _I64(step * (2 if short else 4)))])
            b.store(value, b.bitcast(target, value.type.as_pointer()), align=1)
            return []

        _loop(b, b.shl(count, shared), [], write_step)
        return context.get_dummy_value()

    numbers = (types.int64,) * 5
    return types.void(codes, offsets, group, half, *numbers), generate


def _to_bfloat16(b: Any, value: Any, width: int) -> Any:
    """Round to the nearest, ties to even, in integers; the bits of the results."""
    wide = ir.VectorType(_I32, width)
    bits = b.bitcast(value, wide)
    odd = b.and_(b.lshr(bits, _vector(_I32, 16, width)), _vector(_I32, 1, width))
    bits = b.add(b.add(bits, _vector(_I32, 0x7FFF, width)), odd)
    return b.trunc(b.lshr(bits, _vector(_I32, 16, width)), ir.VectorType(_I16, width))


@intrinsic
def _number(context, stored):  # type: ignore[no-untyped-def]
    """Read a scale as float32: float16 is uint16, bfloat16 int16, e8m0 uint8, int4's own int8."""

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        (value,) = args
        if stored == types.uint16:
            return b.fpext(b.bitcast(value, ir.HalfType()), _F32)
        if stored == types.int16:
            return b.bitcast(b.shl(b.zext(value, _I32), _I32(16)), _F32)
        if stored == types.int8:
            bits = b.shl(b.zext(value, _I32), _I32(20))
            return b.bitcast(b.add(bits, _I32(SCALE_EXPONENT << 23)), _F32)
        if stored == types.uint8:
            bits = b.zext(value, _I32)
            smallest = b.icmp_unsigned("==", bits, _I32(0))  # 2**-127 has no exponent of its own
            return b.bitcast(b.select(smallest, _I32(1 << 22), b.shl(bits, _I32(23))), _F32)
        return value

    return types.float32(stored), generate


def compile_kept(function: Callable[..., Any]) -> Any:
    """Compile *function* when it is first called, or take what an earlier process kept."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # nowhere to keep the result
        return numba.njit(nogil=True)(function)


# Not within `compiled`: what calls a function of a closure is not kept on disk.
@numba.njit(nogil=True, inline="always")
def _read(  # type: ignore[no-untyped-def]
    scales, offsets, slot, output, kind, middle, times, down, across, factor, added
):
    """Read the scales of one row into *factor* as float32, and what its groups add."""
    groups = factor.shape[0]
    if across == 1:  # apart, because no division stands in the way of vectors
        for number in range(groups):
            factor[number] = times * _number(scales[slot, output // down, number])
            if kind == 1:
                added[number] = _number(offsets[slot, output, number])
    else:
        for number in range(groups):
            factor[number] = times * _number(scales[slot, output // down, number // across])
            if kind == 1:
                added[number] = _number(offsets[slot, output, number // across])
    if kind == 2:
        for number in range(groups):
            zero = np.float32(offsets[slot, output, number // across])
            added[number] = -zero * factor[number]
    elif kind == 3:
        for number in range(groups):
            added[number] = np.float32(-middle) * factor[number]


@cache
def compiled(how: Arithmetic, half: bool) -> tuple[Any, Any, Any]:
    """
    Compile what computes with one arithmetic, unpacking to bfloat16 if *half*; kept on disk.

    Returns ``prepare(x)``: float32 rows, ordered as codes are read, and the sums of their groups,
    with zeros up to a multiple of `_lanes`; ``multiply(codes, scales, offsets, slots, rows, x,
    sums, out, begin, end)``: the product of outputs *begin* to *end* of ``slots[p]`` with
    ``x[rows[p]]``, into ``out[p]``, where pairs of one slot that follow each other share the
    reading of its rows; ``unpack(codes, scales, offsets, slot, out)``: a slot's weights,
    ``(outputs, columns)``.
    """
    kind, offset, group = _CODES[how.codes], _OFFSETS[how.offset], how.group
    step = min(group, STEP)
    width, down, across = _lanes(step), how.rows_per_scale, how.groups_per_scale
    columns = np.array(_columns(kind, step))
    middle = 8 if how.codes == "uint4" else 128
    times = np.float32(256 if how.codes == "e4m3" else 1)  # see `_widen`
    short = int(half)

    @compile_kept
    def prepare(x):  # type: ignore[no-untyped-def]
        groups = x.shape[1] // group
        ordered = np.empty(x.shape, np.float32)
        sums = np.zeros((x.shape[0], groups + -groups % width), np.float32)
        for row in range(x.shape[0]):
            for begin in range(0, x.shape[1], step):
                total = np.float32(0)
                for place in range(step):
                    value = x[row, begin + columns[place]]
                    ordered[row, begin + place] = value
                    total += value
                sums[row, begin // group] += total
        return ordered, sums

    @compile_kept
    def multiply(  # type: ignore[no-untyped-def]
        codes, scales, offsets, slots, rows, x, sums, out, begin, end
    ):
        groups, wide = x.shape[1] // group, sums.shape[1] // width
        factor, added = np.empty(groups, np.float32), np.zeros(wide * width, np.float32)
        result, xs = np.empty(BATCH, np.float32), np.empty(2 * BATCH, np.int64)
        row_bytes = codes.shape[2]
        pair = 0
        while pair < slots.shape[0]:
            slot, count = slots[pair], 1
            while count < BATCH and pair + count < slots.shape[0] and slots[pair + count] == slot:
                count += 1
            batch = count if count < 3 else BATCH
            for n in range(batch):  # what lacks is computed once more, and not written
                row = rows[pair + min(n, count - 1)]
                xs[n] = x.ctypes.data + row * x.shape[1] * 4
                xs[batch + n] = sums.ctypes.data + row * sums.shape[1] * 4
            for output in range(begin, end):
                _read(
                    scales, offsets, slot, output, offset, middle, times, down, across, factor,
                    added,
                )  # fmt: skip
                place = codes.ctypes.data + (slot * codes.shape[1] + output) * row_bytes
                if batch == 1:
                    _dot(
                        kind, offset, group, 1, groups, place, AHEAD * row_bytes,
                        factor.ctypes.data, added.ctypes.data, wide, xs.ctypes.data,
                        result.ctypes.data,
                    )  # fmt: skip
                elif batch == 2:
                    _dot(
                        kind, offset, group, 2, groups, place, AHEAD * row_bytes,
                        factor.ctypes.data, added.ctypes.data, wide, xs.ctypes.data,
                        result.ctypes.data,
                    )  # fmt: skip
                else:
                    _dot(
                        kind, offset, group, BATCH, groups, place, AHEAD * row_bytes,
                        factor.ctypes.data, added.ctypes.data, wide, xs.ctypes.data,
                        result.ctypes.data,
                    )  # fmt: skip
                for n in range(count):
                    out[pair + n, output] = result[n]
            pair += count

    @compile_kept
    def unpack(codes, scales, offsets, slot, out):  # type: ignore[no-untyped-def]
        groups = out.shape[1] // group
        factor, added = np.empty(groups, np.float32), np.zeros(groups, np.float32)
        for output in range(codes.shape[1]):
            _read(
                scales, offsets, slot, output, offset, middle, times, down, across, factor, added
            )  # fmt: skip
            _unpack(
                kind, offset, group, short, groups,
                codes.ctypes.data + (slot * codes.shape[1] + output) * codes.shape[2],
                factor.ctypes.data, added.ctypes.data,
                out.ctypes.data + output * out.shape[1] * out.itemsize,
            )  # fmt: skip

    return prepare, multiply, unpack
