"""Codes stand for weights within half a step, and the kernel expands them bit for bit."""

import numpy as np
import pytest
import tiny
import torch

from melinoe.engine.device.blocks import addresses
from melinoe.engine.device.compressed import CompressedStore, block_bytes
from melinoe.engine.device.expanding import ExpandPlan
from melinoe.engine.device.quantize import Codes, dequantise, quantise
from melinoe.errors import AttachError
from melinoe.moe.experts import find_experts

INTERPRETED = True
CPU = torch.device("cpu")
KINDS = {
    "normal": lambda g: torch.randn(128, 64, generator=g) * 0.02,
    "far from zero": lambda g: torch.randn(128, 64, generator=g) * 0.01 + 3,
    "tiny": lambda g: torch.randn(128, 64, generator=g) * 1e-6,
    "constant": lambda g: torch.full((128, 64), 0.3),
    "zero": lambda g: torch.zeros(128, 64),
    "outliers": lambda g: torch.randn(128, 64, generator=g) ** 5 * 10,
    "large": lambda g: torch.randn(128, 64, generator=g) * 10000,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_weight_is_off_by_half_a_step_at_most(kind, bits, symmetric):
    """Against the formula in float64; the step covers the group's range, rounded up to float16."""
    weights = KINDS[kind](torch.Generator().manual_seed(bits))
    codes, scale, minimum = quantise(weights, bits, symmetric)
    assert int(codes.max()) < 2**bits
    groups, step = weights.double().view(-1, 64), scale.double()[:, None]
    exact = codes.double() * step + minimum.double()[:, None]
    assert ((exact - groups).abs() <= step / 2 * (1 + 1e-12)).all()
    spread = groups.amax(1) - groups.amin(1)
    widest = 2 * groups.abs().amax(1) / (2**bits - 2) if symmetric else spread / (2**bits - 1)
    ulps = minimum.double().abs() * 2**-10 / (2**bits - 1)  # the minimum's own rounding
    assert (scale.double() <= widest * (1 + 2**-9) + ulps + 2**-23).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 4])
def test_codes_decode_to_the_nearest_number_of_their_type(bits, dtype):
    """float64 arithmetic, rounded to float32 and then to the type, gives the same bits."""
    rng = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (500, 64), generator=rng, dtype=torch.uint8)
    scale = (torch.rand(500, generator=rng) * 0.01).half()
    minimum = (torch.randn(500, generator=rng)).half()
    exact = codes.double() * scale.double()[:, None] + minimum.double()[:, None]
    decoded = dequantise(Codes(codes, scale, minimum), dtype)
    assert torch.equal(decoded, exact.float().to(dtype).reshape(-1))


def test_zero_points_err_less_than_symmetric_codes():
    """On normal weights, at the same bits: why they were chosen."""
    weights = KINDS["normal"](torch.Generator().manual_seed(3))

    def error(bits, symmetric):
        found = dequantise(quantise(weights, bits, symmetric), torch.float32)
        return float((found.view_as(weights) - weights).norm())

    assert error(4, False) < 0.87 * error(4, True)
    assert error(8, False) < 0.92 * error(8, True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5])
def test_weights_without_a_code_are_refused(value):
    """Not stored as something else; and the model keeps its weights."""
    model = tiny.tiny_model("olmoe")
    layers = find_experts(model)
    with torch.no_grad():
        layers[1].module.down_proj[7, 0, 0] = value
    before = layers[0].module.gate_up_proj.clone()
    with pytest.raises(AttachError, match="without compression"):
        CompressedStore.from_modules(layers, "int4")
    assert torch.equal(layers[0].module.gate_up_proj, before)
    with pytest.raises(AttachError, match="int8, int4"):
        CompressedStore(layers, "int3")


def filled(family, compression, dtype):
    layers = find_experts(tiny.tiny_model(family, dtype=dtype))
    store = CompressedStore(layers, compression)
    weights = []
    for layer in layers:
        stacked = dict(layer.module.named_parameters(recurse=False))
        for expert in range(layer.num_experts):
            one = {t.name: stacked[t.name].detach()[expert] for t in layer.tensors}
            store.write(layer.index, expert, one)
        weights.append(stacked)
    return layers, store, weights


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
@pytest.mark.parametrize("compression", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_expands_what_the_store_reads(family, compression, dtype):
    """Bit for bit, biases too, into poisoned slots; slots not listed and guards stay poisoned."""
    layers, store, _ = filled(family, compression, dtype)
    layer, guard, num_slots = layers[0], 64, 3
    around, slots = {}, {}
    for tensor in layer.tensors:
        numel = int(np.prod(tensor.shape))
        flat = torch.full((num_slots * numel + 2 * guard,), -7.0, dtype=dtype)
        around[tensor.name] = flat
        slots[tensor.name] = flat[guard:-guard].view(num_slots, *tensor.shape)
    expected = {name: flat.clone() for name, flat in around.items()}
    for chunk_groups in (2, 16):
        plan = ExpandPlan(
            addresses(store, 0, CPU), store.sections(0), store.bits, slots,
            chunk_groups=chunk_groups,
        )  # fmt: skip
        pairs = [(5, 2), (1, 0)] if chunk_groups == 2 else [(3, 0)]
        lists = torch.tensor(pairs, dtype=torch.int32).T.contiguous()
        plan.launch(lists[0], lists[1], torch.tensor([len(pairs)], dtype=torch.int32))
        for expert, slot in pairs:
            into = {
                name: flat[guard:-guard].view(num_slots, -1)[slot]
                for name, flat in expected.items()
            }
            shaped = {t.name: into[t.name].view(t.shape) for t in layer.tensors}
            store.read(0, expert, shaped)
        for name in around:
            assert torch.equal(around[name], expected[name]), name


@pytest.mark.parametrize("compression", ["int8", "int4"])
def test_every_expert_is_within_its_error_bound(compression):
    """Half a step of its own group plus the type's rounding, expert by expert; biases exact."""
    layers, store, weights = filled("gpt_oss", compression, torch.bfloat16)
    for layer in layers:
        for expert in range(layer.num_experts):
            into = {t.name: torch.empty(t.shape, dtype=t.dtype) for t in layer.tensors}
            store.read(layer.index, expert, into)
            for tensor in layer.tensors:
                true = weights[layer.index][tensor.name].detach()[expert]
                if len(tensor.shape) < 2:
                    assert torch.equal(into[tensor.name], true)
                    continue
                groups = true.double().reshape(-1, 64)
                step = (groups.amax(1) - groups.amin(1)) / (2**store.bits - 1)
                bound = step[:, None] * 0.505 + groups.abs() * 2**-8 + 1e-6
                off = (into[tensor.name].double().reshape(-1, 64) - groups).abs()
                assert (off <= bound).all()


@pytest.mark.parametrize(("compression", "times"), [("int8", 1.88), ("int4", 3.55)])
def test_blocks_carry_the_stated_fraction_of_bf16(compression, times):
    """8.5 and 4.5 bits a weight."""
    layers = find_experts(tiny.tiny_model("olmoe", dtype=torch.bfloat16))
    store = CompressedStore(layers, compression)
    whole = layers[0].block_bytes
    assert store.block_bytes(0) == block_bytes(layers[0], compression)
    assert whole / store.block_bytes(0) == pytest.approx(times, rel=0.01)
