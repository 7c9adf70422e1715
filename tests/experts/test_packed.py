"""Packed slots compute what their blocks mean, to bits that depend on nothing else in a request."""

import numba
import numpy as np
import pytest
import tiny
import torch

from melinoe.experts import packed, packed_dot
from melinoe.experts.formats import named_format
from melinoe.experts.integer import Integer
from melinoe.experts.packed import MANY, PackedExperts
from melinoe.moe.compute import Pairs, StandIn
from melinoe.moe.experts import find_experts

# One of each way to store codes, scales and offsets; by name or by hand.
KINDS = {
    "int4": named_format("int4"),
    "int8": named_format("int8"),
    "mxfp4": named_format("mxfp4"),
    "fp8": named_format("fp8"),
    "int4 minimum": Integer(4),
    "int4 symmetric": Integer(4, 64, "symmetric"),
    "int4 row": Integer(4, None),
}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


class Slots:
    """Two slots with one projection of random blocks, and what the blocks mean."""

    def __init__(self, kind, outputs, columns):
        weights = torch.randn(2, outputs, columns, generator=rng()) * 0.05
        blocks = [kind.encode_matrix(one) for one in weights]
        for name in blocks[0]:
            setattr(self, f"down_proj.{name}", torch.stack([block[name] for block in blocks]))
        self.meaning = [kind.decode_matrix(block, outputs, columns) for block in blocks]


def multiply(kind, slots, x, rows, of_slots):
    shape = tuple(slots.meaning[0].shape)
    part = packed.Part("down_proj", shape, torch.float32)
    function = PackedExperts(kind, (part,))
    matrix, parts = function._matrices["down_proj"], function._parts(slots, "down_proj")
    return matrix, matrix.multiply(parts, x, np.array(rows), np.array(of_slots))


@pytest.mark.parametrize("columns", [256, 104])
@pytest.mark.parametrize("name", KINDS)
def test_products_are_those_of_the_unpacked_weights(name, columns):
    """Against float64, relative to the largest: only the order of summation is left."""
    if name == "mxfp4":
        columns -= columns % 32
    kind = KINDS[name]
    slots = Slots(kind, 150, columns)  # no multiple of the rows that are computed side by side
    x = torch.randn(3, columns, generator=rng(1))
    rows, of_slots = [0, 2, 1, 0, 0, 1, 2], [1, 0, 1, 0, 0, 0, 0]  # alone, and up to four together
    matrix, found = multiply(kind, slots, x, rows, of_slots)
    for row, slot, product in zip(rows, of_slots, found, strict=True):
        true = slots.meaning[slot].double() @ x[row].double()
        assert float((product - true).abs().max()) <= 1e-6 * float(true.abs().max())
    for slot in (0, 1):
        parts = {name: getattr(slots, f"down_proj.{name}") for name in matrix.parts}
        assert torch.equal(matrix.weights(parts, slot), slots.meaning[slot])


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [4, 8])
def test_zero_points_and_any_type_of_scale_are_read(bits, scale_dtype):
    """As GPTQ and compressed-tensors have them: built by hand, since they are not made here."""
    kind = Integer(bits, 128, "zero", scale_dtype)
    codes = torch.randint(0, 2**bits, (1, 8, 256), generator=rng(), dtype=torch.uint8)
    slots = Slots.__new__(Slots)
    block = {
        "codes": codes if bits == 8 else codes[..., ::2] | codes[..., 1::2] << 4,
        "scales": (torch.rand(1, 8, 2, generator=rng()) * 0.01).to(scale_dtype),
        "zeros": torch.randint(0, 2**bits, (1, 8, 2), generator=rng(), dtype=torch.uint8),
    }
    for part, tensor in block.items():
        setattr(slots, f"down_proj.{part}", tensor)
    zeros = block["zeros"][0].double().repeat_interleave(128, 1)
    true = (codes[0].double() - zeros) * block["scales"][0].double().repeat_interleave(128, 1)
    slots.meaning = [true.float()]
    x = torch.randn(1, 256, generator=rng(1))
    found = multiply(kind, slots, x, [0], [0])[1][0]
    expected = true @ x[0].double()
    assert float((found - expected).abs().max()) <= 1e-6 * float(expected.abs().max())


@pytest.mark.parametrize(("name", "features"), [("int4", "avx512f"), ("int4", ""), ("fp8", "")])
def test_other_processors_compute_the_same_weights(monkeypatch, name, features):
    """With 16 floats permuted in a register, and without any such instruction."""
    kind, x = KINDS[name], torch.randn(1, 256, generator=rng(1))
    slots = Slots(kind, 16, 256)
    monkeypatch.setattr(packed_dot, "compile_kept", numba.njit(nogil=True))  # keep nothing of it
    monkeypatch.setattr(packed_dot, "_HOST", {features: True})
    packed_dot.compiled.cache_clear()
    matrix, found = multiply(kind, slots, x, [0], [0])
    parts = {name: getattr(slots, f"down_proj.{name}") for name in matrix.parts}
    assert torch.equal(matrix.weights(parts, 1), slots.meaning[1])
    packed_dot.compiled.cache_clear()
    true = slots.meaning[0].double() @ x[0].double()
    assert float((found[0] - true).abs().max()) <= 1e-6 * float(true.abs().max())


@pytest.mark.parametrize("name", ["int4", "fp8"])
def test_bits_of_a_product_depend_on_its_row_and_expert_alone(name, monkeypatch):
    """Any slot, any company in the request, any number of threads."""
    kind = KINDS[name]
    slots = Slots(kind, 150, 256)
    x = torch.randn(5, 256, generator=rng(1))
    alone = multiply(kind, slots, x[3:4], [0], [1])[1][0]
    assert torch.equal(multiply(kind, slots, x, [0, 3, 4, 3], [0, 1, 1, 0])[1][1], alone)
    assert torch.equal(multiply(kind, slots, x, [0, 1, 2, 4, 3, 3], [1] * 6)[1][4], alone)
    for part in kind.matrix_parts(150, 256):
        tensor = getattr(slots, f"down_proj.{part}")
        setattr(slots, f"down_proj.{part}", torch.cat([tensor[1:].clone()] * 3))
    assert torch.equal(multiply(kind, slots, x, [3], [2])[1][0], alone)
    monkeypatch.setattr(packed, "_WORTH_THREADS", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(multiply(kind, slots, x, [3], [2])[1][0], alone)
    finally:
        torch.set_num_threads(before)


def test_inputs_may_lie_in_memory_by_columns():
    """As a transposed tensor does; equal bits."""
    kind, x = KINDS["int4"], torch.randn(5, 128, generator=rng(1))
    slots = Slots(kind, 16, 128)
    found = multiply(kind, slots, x.T.contiguous().T, [4, 1], [0, 1])[1]
    assert torch.equal(found, multiply(kind, slots, x, [4, 1], [0, 1])[1])


# Gated; transposed, interleaved, clamped and with biases; without a gate; with a norm of its own.
FAMILIES = ["olmoe", "gpt_oss", "nemotron_h", "muse_spark"]


def both(family, kind, dtype=torch.float32):
    """A module whose weights are what its blocks mean, and the function with slots 7, 6, ... 0."""
    layer = find_experts(tiny.tiny_model(family, dtype=dtype))[0]
    module = layer.module
    blocks = []
    for expert in range(layer.num_experts):
        own = {t.name: module.get_parameter(t.name).detach()[expert] for t in layer.tensors}
        blocks.append(kind.encode(layer.tensors, own))
        for name, meant in kind.decode(layer.tensors, blocks[-1]).items():
            own[name].copy_(meant)
    parts = kind.parts(layer.tensors)
    stacks = {p.name: torch.stack([block[p.name] for block in blocks[::-1]]) for p in parts}
    return layer, PackedExperts(kind, layer.tensors), StandIn(module, stacks, layer.num_experts)


def hidden_of(layer, tokens, dtype=torch.float32):
    width = next(t for t in layer.tensors if t.name == "down_proj").rows_columns[0]
    hidden = torch.randn(tokens, width, generator=rng(2)).to(dtype)
    choice = torch.rand(tokens, layer.num_experts, generator=rng(3)).topk(2).indices
    return hidden, choice, torch.rand(tokens, 2, generator=rng(4)).to(dtype)


@pytest.mark.parametrize("tokens", [1, 80])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_request_is_computed_as_the_module_would(family, tokens):
    """Few tokens and many, against the module's own eager loop on the unpacked weights."""
    layer, function, slots = both(family, KINDS["int8"])
    hidden, choice, weights = hidden_of(layer, tokens)
    with torch.inference_mode():
        layer.module.config._experts_implementation = "eager"
        expected = layer.module(hidden, choice, weights)
        found = function(slots, hidden, layer.num_experts - 1 - choice, weights)
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("can", [True, False])
def test_in_bfloat16_few_and_many_tokens_agree_within_its_rounding(can, monkeypatch):
    """Many tokens are multiplied in the module's type, if the processor can; few in float32."""
    monkeypatch.setattr(packed, "multiplies_bfloat16", lambda: can)
    layer, function, slots = both("olmoe", KINDS["int4"], torch.bfloat16)
    hidden, choice, weights = hidden_of(layer, 80, torch.bfloat16)
    with torch.inference_mode():
        many = function(slots, hidden, choice, weights)
        few = torch.cat([function(slots, *one) for one in zip(*(
            t.split(1) for t in (hidden, choice, weights)), strict=True)])  # fmt: skip
    assert many.dtype == few.dtype == torch.bfloat16
    share = float((many - few).float().norm() / few.float().norm())
    assert 1e-3 < share < 1e-2 if can else share < 1e-3


@pytest.mark.parametrize("tokens", [3, 80])
def test_a_request_in_parts_has_the_bits_of_one_at_once(tokens):
    """Expert by expert through `Pairs`, as a cache with one slot would."""
    layer, function, slots = both("gpt_oss", KINDS["int4"], torch.bfloat16)
    hidden, choice, weights = hidden_of(layer, tokens, torch.bfloat16)
    counts = np.bincount(choice.numpy().ravel())
    assert (counts.max() >= MANY) == (tokens == 80)
    with torch.inference_mode():
        pairs = Pairs(hidden, 2, torch.float32)
        for expert in range(layer.num_experts):
            flat = choice.reshape(-1)
            pairs.add(function, slots, torch.where(flat == expert, flat, -1))
        assert torch.equal(pairs.total(weights), function(slots, hidden, choice, weights))
