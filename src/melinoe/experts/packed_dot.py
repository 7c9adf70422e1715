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

# Rows that are computed side by side, so that each vector of inputs is loaded once for all.
ROWS = 4
# Vectors that are multiplied with an expert's rows while those are in registers.
BATCH = 4
# What the 16 codes of e2m1 mean: the highest bit is the sign.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# What those of int4 mean.
LEVELS = (-120, -97, -77, -59, -44, -30, -18, -6, 6, 18, 30, 44, 59, 77, 97, 120)
# Of the smallest scale of 8 bits, as a float32 has it.
SCALE_EXPONENT = 103
_CODES = {"uint4": 0, "e2m1": 1, "uint8": 2, "e4m3": 3, "levels": 4}
_PAIRS = (_CODES["uint4"], _CODES["e2m1"], _CODES["levels"])  # two codes to a byte
_OFFSETS = {"none": 0, "minimum": 1, "zero": 2, "symmetric": 3}

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


def _look_up(b: Any, table: Any, index: Any, width: int) -> Any:
    """Take an entry of *table* for each lane; LLVM makes one permutation of it."""
    found = ir.Constant(ir.VectorType(table.type.element, width), ir.Undefined)
    for lane in range(width):
        entry = b.extract_element(table, b.extract_element(index, _I32(lane)))
        found = b.insert_element(found, entry, _I32(lane))
    return found


def _load(b: Any, kind: Any, width: int, pointer: Any) -> Any:
    return b.load(b.bitcast(pointer, ir.VectorType(kind, width).as_pointer()), align=1)


def _to_float(b: Any, value: Any, width: int) -> Any:
    """Integers of any width, signed, as float32."""
    wide = ir.VectorType(_I32, width)
    value = value if value.type == wide else b.sext(value, wide)
    return b.sitofp(value, ir.VectorType(_F32, width))


def _permutes_floats(width: int) -> bool:
    """Whether the processor takes 16 floats from one register by index."""
    return width == 16 and bool(llvmlite.binding.get_host_cpu_features().get("avx512f"))


def _widen(b: Any, codes: int, pointer: Any, width: int) -> list[Any]:
    """Two vectors of *width* float32 numbers from the codes at *pointer*."""
    if codes in _PAIRS:  # even columns first, then the odd ones
        raw = _load(b, _I8, width, pointer)
        levels = LEVELS if codes == _CODES["levels"] else E2M1
        if codes == _CODES["uint4"] or _permutes_floats(width):
            wide = b.zext(raw, ir.VectorType(_I32, width))
            halves = [b.and_(wide, _vector(_I32, 15, width)), b.lshr(wide, _vector(_I32, 4, width))]
            if codes == _CODES["uint4"]:
                return [_to_float(b, half, width) for half in halves]
            table = _vector(_F32, levels, 16)
            return [_look_up(b, table, half, width) for half in halves]
        # Twice a level of e2m1 is whole: a table of bytes, which older processors permute too.
        unit = 1 if codes == _CODES["levels"] else 2
        table = _vector(_I8, [int(unit * level) & 255 for level in levels], 16)
        halves = [b.and_(raw, _vector(_I8, 15, width)), b.lshr(raw, _vector(_I8, 4, width))]
        found = [_to_float(b, _look_up(b, table, index, width), width) for index in halves]
        return [b.fmul(_vector(_F32, 1 / unit, width), half) for half in found]
    found = []
    for part in range(2):
        raw = _load(b, _I8, width, b.gep(pointer, [_I64(part * width)]))
        if codes == _CODES["uint8"]:
            found.append(_to_float(b, b.zext(raw, ir.VectorType(_I32, width)), width))
            continue
        # The bits of e4m3 as those of a float16 that is 2**8 times smaller; also below normal.
        bits = b.shl(b.sext(raw, ir.VectorType(_I16, width)), _vector(_I16, 7, width))
        bits = b.and_(bits, _vector(_I16, 0xBF80, width))
        wide = b.fpext(
            b.bitcast(bits, ir.VectorType(ir.HalfType(), width)), ir.VectorType(_F32, width)
        )
        found.append(b.fmul(wide, _vector(_F32, 256.0, width)))
    return found


def _bytes_of_two(codes: int, width: int) -> int:
    """Bytes of the codes that `_widen` reads."""
    return width if codes in _PAIRS else 2 * width


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
    context, codes, offsets, width, chunks, batch, groups, data, step, scale, shift, wide, xs, out
):
    """
    Multiply `ROWS` packed rows, *step* bytes apart, with *batch* vectors; all by address.

    *scale* is float32 ``(ROWS, groups)``, *shift* ``(ROWS, wide * width)``: the same, then zeros;
    *xs* lists the addresses of the vectors, then of the sums of their groups, then zeros; *out*
    takes ``(batch, ROWS)``.
    """
    kind, shifted = codes.literal_value, offsets.literal_value
    lanes, parts, many = width.literal_value, chunks.literal_value, batch.literal_value
    size = _bytes_of_two(kind, lanes)

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        count, begin, step, scale, shift, ends, inputs, into = args[5:]
        floats = ir.VectorType(_F32, lanes)
        fma = cgutils.get_or_insert_function(
            b.module, ir.FunctionType(floats, [floats] * 3), f"llvm.fmuladd.v{lanes}f32"
        )
        fetch = b.module.declare_intrinsic(
            "llvm.prefetch",
            [_I8.as_pointer()],
            ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32]),
        )
        begin = b.inttoptr(begin, _I8.as_pointer())
        scale, shift, into = (b.inttoptr(one, _F32.as_pointer()) for one in (scale, shift, into))
        inputs = b.inttoptr(inputs, _I64.as_pointer())
        addresses = [b.load(b.gep(inputs, [_I64(n)])) for n in range(2 * many)]
        vectors = [b.inttoptr(address, _F32.as_pointer()) for address in addresses]

        def group(number: Any, before: list[Any]) -> list[Any]:
            found = list(before)
            at = b.mul(number, _I64(parts * 2 * lanes))
            x_of = [
                [_load(b, _F32, lanes, b.gep(x, [b.add(at, _I64(n * lanes))]))
                 for n in range(2 * parts)]
                for x in vectors[:many]
            ]  # fmt: skip
            for row in range(ROWS):
                place = b.add(b.mul(step, _I64(row)), b.mul(number, _I64(parts * size)))
                here = b.gep(begin, [place])
                if size * parts >= 16:  # the same place of the rows that come next
                    b.call(
                        fetch, [b.gep(here, [b.mul(step, _I64(ROWS))]), _I32(0), _I32(3), _I32(1)]
                    )
                weights = []
                for part in range(parts):
                    weights += _widen(b, kind, b.gep(here, [_I64(part * size)]), lanes)
                index = b.add(b.mul(count, _I64(row)), number)
                factor = _splat(b, b.load(b.gep(scale, [index])), lanes)
                for n in range(many):
                    total = b.fmul(weights[0], x_of[n][0])
                    for weight, x_part in zip(weights[1:], x_of[n][1:], strict=True):
                        total = b.call(fma, [weight, x_part, total])
                    found[n * ROWS + row] = b.call(fma, [factor, total, before[n * ROWS + row]])
            return found

        def added(number: Any, before: list[Any]) -> list[Any]:
            at, found = b.mul(number, _I64(lanes)), []
            sums_of = [_load(b, _F32, lanes, b.gep(x, [at])) for x in vectors[many:]]
            length = b.mul(ends, _I64(lanes))
            own = [
                _load(b, _F32, lanes, b.gep(shift, [b.add(b.mul(length, _I64(row)), at)]))
                for row in range(ROWS)
            ]
            for n in range(many):
                for row in range(ROWS):
                    found.append(b.call(fma, [own[row], sums_of[n], before[n * ROWS + row]]))
            return found

        zero = _vector(_F32, 0.0, lanes)
        totals = _loop(b, count, [zero] * ROWS * many, group)
        if shifted:
            totals = _loop(b, ends, totals, added)
        for place, total in enumerate(totals):
            half = lanes // 2
            while half:
                low = _shuffle(b, total, total, list(range(half)))
                high = _shuffle(b, total, total, list(range(half, 2 * half)))
                total, half = b.fadd(low, high), half // 2
            b.store(b.extract_element(total, _I32(0)), b.gep(into, [_I64(place)]))
        return context.get_dummy_value()

    numbers = (types.int64,) * 8
    return types.void(codes, offsets, width, chunks, batch, *numbers), generate


@intrinsic(prefer_literal=True)
def _unpack(  # type: ignore[no-untyped-def]
    context, codes, offsets, width, chunks, half, groups, packed, scales, offset, out
):
    """Write the weights of one packed row to *out*: as bfloat16 if *half*, else as float32."""
    kind, shifted, short = codes.literal_value, offsets.literal_value, half.literal_value
    lanes, parts = width.literal_value, chunks.literal_value
    size = _bytes_of_two(kind, lanes)

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        count, begin, scale, shift, into = args[5:]
        begin, into = (b.inttoptr(address, _I8.as_pointer()) for address in (begin, into))
        scale, shift = (b.inttoptr(address, _F32.as_pointer()) for address in (scale, shift))

        def group(number: Any, _: list[Any]) -> list[Any]:
            factor = _splat(b, b.load(b.gep(scale, [number])), 2 * lanes)
            added = _splat(b, b.load(b.gep(shift, [number])), 2 * lanes)
            for part in range(parts):
                place = b.add(b.mul(number, _I64(parts)), _I64(part))
                low, high = _widen(b, kind, b.gep(begin, [b.mul(place, _I64(size))]), lanes)
                order = list(range(2 * lanes))
                if size == lanes:
                    order = [n // 2 + lanes * (n % 2) for n in order]
                value = b.fmul(_shuffle(b, low, high, order), factor)
                if shifted:
                    value = b.fadd(value, added)
                if short:
                    value = _to_bfloat16(b, value, 2 * lanes)
                width_bytes = 2 * lanes * (2 if short else 4)
                target = b.gep(into, [b.mul(place, _I64(width_bytes))])
                b.store(value, b.bitcast(target, value.type.as_pointer()), align=1)
            return []

        _loop(b, count, [], group)
        return context.get_dummy_value()

    numbers = (types.int64,) * 5
    return types.void(codes, offsets, width, chunks, half, *numbers), generate


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


@compile_kept
def round_to_codes(values, scale, minimum, most, codes):  # type: ignore[no-untyped-def]
    """Write the code nearest to each of *values* ``(rows, groups, group)``, in float64."""
    for row in range(values.shape[0]):
        for number in range(values.shape[1]):
            step, least = scale[row, number], minimum[row, number]
            for place in range(values.shape[2]):
                code = 0.0
                if step > 0:
                    code = np.rint((np.float64(values[row, number, place]) - least) / step)
                codes[row, number, place] = np.uint8(min(max(code, 0.0), most))


# Not within `compiled`: what calls a function of a closure is not kept on disk.
@numba.njit(nogil=True, inline="always")
def _read(  # type: ignore[no-untyped-def]
    scales, offsets, slot, output, kind, middle, down, across, factor, added, n
):
    """Read the scales of one row into ``factor[n]`` as float32, and what its groups add."""
    groups = factor.shape[1]
    if across == 1:  # apart, because no division stands in the way of vectors
        for number in range(groups):
            factor[n, number] = _number(scales[slot, output // down, number])
            if kind == 1:
                added[n, number] = _number(offsets[slot, output, number])
    else:
        for number in range(groups):
            factor[n, number] = _number(scales[slot, output // down, number // across])
            if kind == 1:
                added[n, number] = _number(offsets[slot, output, number // across])
    if kind == 2:
        for number in range(groups):
            zero = np.float32(offsets[slot, output, number // across])
            added[n, number] = -zero * factor[n, number]
    elif kind == 3:
        for number in range(groups):
            added[n, number] = np.float32(-middle) * factor[n, number]


@cache
def compiled(how: Arithmetic, half: bool) -> tuple[Any, Any, Any]:
    """
    Compile what computes with one arithmetic; kept on disk, so that the next process has it.

    Args:
        how: The codes and scales.
        half: Whether rows are unpacked to bfloat16, else to float32.

    Returns:
        ``prepare(x, ordered, sums)``: order float32 rows *x* as the codes lie, and sum each group
        in *sums* ``(rows, groups)``, which has zeros behind up to a multiple of `Arithmetic.lanes`.

        ``multiply(codes, scales, offsets, slots, rows, x, sums, out, begin, end)``: the product of
        outputs *begin* to *end* of the expert in ``slots[p]`` with ``x[rows[p]]``, into ``out[p]``;
        pairs of one slot that follow each other share the reading of its rows.

        ``unpack(codes, scales, offsets, slot, out)``: the weights of a slot, ``(outputs,
        columns)``.
    """
    kind, offset, group = _CODES[how.codes], _OFFSETS[how.offset], how.group
    width = how.lanes
    chunks, down, across = group // (2 * width), how.rows_per_scale, how.groups_per_scale
    pairs = kind in _PAIRS
    middle = 8 if kind == _CODES["uint4"] else 128
    short = int(half)

    @compile_kept
    def prepare(x, ordered, sums):  # type: ignore[no-untyped-def]
        for row in range(x.shape[0]):
            for number in range(x.shape[1] // group):
                total = np.float32(0)
                for place in range(group):
                    at = number * group + place
                    source = at
                    if pairs:
                        half, lane = place // width, place % width
                        source = number * group + half // 2 * 2 * width + 2 * lane + half % 2
                    ordered[row, at] = x[row, source]
                    total += x[row, source]
                sums[row, number] = total

    @compile_kept
    def multiply(  # type: ignore[no-untyped-def]
        codes, scales, offsets, slots, rows, x, sums, out, begin, end
    ):
        groups, wide = x.shape[1] // group, sums.shape[1] // width
        factor = np.empty((ROWS, groups), np.float32)
        added = np.zeros((ROWS, wide * width), np.float32)
        result = np.empty((BATCH, ROWS), np.float32)
        xs = np.empty(2 * BATCH, np.int64)
        outputs, stride = codes.shape[1], codes.shape[2]
        pair = 0
        while pair < slots.shape[0]:
            slot, count = slots[pair], 1
            while count < BATCH and pair + count < slots.shape[0] and slots[pair + count] == slot:
                count += 1
            batch = 1 if count == 1 else BATCH
            for n in range(batch):  # what lacks is computed once more, and not written
                row = rows[pair + min(n, count - 1)]
                xs[n] = x.ctypes.data + row * x.shape[1] * 4
                xs[batch + n] = sums.ctypes.data + row * sums.shape[1] * 4
            for block in range(begin, end, ROWS):
                # The last rows are computed with some before them, to the same bits.
                first = min(block, outputs - ROWS)
                for n in range(ROWS):
                    _read(
                        scales, offsets, slot, first + n, offset, middle, down, across,
                        factor, added, n,
                    )  # fmt: skip
                place = codes.ctypes.data + (slot * outputs + first) * stride
                if batch == 1:
                    _dot(
                        kind, offset, width, chunks, 1, groups, place, stride, factor.ctypes.data,
                        added.ctypes.data, wide, xs.ctypes.data, result.ctypes.data,
                    )  # fmt: skip
                else:
                    _dot(
                        kind, offset, width, chunks, BATCH, groups, place, stride,
                        factor.ctypes.data, added.ctypes.data, wide, xs.ctypes.data,
                        result.ctypes.data,
                    )  # fmt: skip
                for m in range(count):
                    for n in range(ROWS):
                        out[pair + m, first + n] = result[m, n]
            pair += count

    @compile_kept
    def unpack(codes, scales, offsets, slot, out):  # type: ignore[no-untyped-def]
        groups = out.shape[1] // group
        factor = np.empty((1, groups), np.float32)
        added = np.zeros((1, groups), np.float32)
        outputs, stride = codes.shape[1], codes.shape[2]
        for output in range(outputs):
            _read(
                scales, offsets, slot, output, offset, middle, down, across, factor, added, 0
            )  # fmt: skip
            _unpack(
                kind, offset, width, chunks, short, groups,
                codes.ctypes.data + (slot * outputs + output) * stride,
                factor.ctypes.data, added.ctypes.data,
                out.ctypes.data + output * out.shape[1] * out.itemsize,
            )  # fmt: skip

    return prepare, multiply, unpack
