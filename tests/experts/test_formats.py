"""Each format means what its own reference says, byte by byte, and errs within its bound."""

import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from melinoe.errors import AttachError, UnsupportedModelError
from melinoe.experts.format import PLAIN, Part
from melinoe.experts.formats import FORMATS, named_format
from melinoe.experts.fp8 import Fp8
from melinoe.experts.int4 import Int4
from melinoe.experts.integer import Integer, pack_pairs
from melinoe.experts.mxfp4 import Mxfp4

PACKED = [name for name in FORMATS if name != "plain"]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def test_mxfp4_decodes_as_transformers_does():
    """All codes with all scales but the extreme ones, in gpt-oss's own layout: equal in float32."""
    blocks = torch.randint(0, 256, (1, 64, 2, 16), generator=rng(), dtype=torch.uint8)
    scales = torch.randint(2, 250, (1, 64, 2), generator=rng(), dtype=torch.uint8)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)[0]  # (in, out)
    parts = {"codes": blocks[0].reshape(64, 32), "scales": scales[0]}
    decoded = Mxfp4().decode_matrix(parts, 64, 64)
    assert torch.equal(decoded.T, expected)
    assert len(set(decoded.abs().flatten().tolist())) > 100


@pytest.mark.parametrize("shape", [(256, 384), (128, 128)])
def test_fp8_decodes_as_transformers_does(shape):
    """Every code that is a number, with scales of all sizes: equal in float32."""
    codes = torch.randint(0, 255, shape, generator=rng(), dtype=torch.uint8)
    codes[codes == 127] = 0
    codes = codes.view(torch.float8_e4m3fn)
    scales = torch.rand(shape[0] // 128, shape[1] // 128, generator=rng()) ** 8
    expected = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.float32)
    decoded = Fp8().decode_matrix({"codes": codes, "scales": scales}, *shape)
    assert torch.equal(decoded, expected)


def test_fp8_squares_that_are_not_whole_have_their_own_scale():
    """130 x 144 weights: the last two rows and 16 columns have scales of their own."""
    codes = torch.full((130, 144), 1.0).to(torch.float8_e4m3fn)
    scales = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    decoded = Fp8().decode_matrix({"codes": codes, "scales": scales}, 130, 144)
    assert decoded[0, 127] == 1 and decoded[127, 128] == 2
    assert decoded[128, 0] == 3 and decoded[129, 143] == 4


@pytest.mark.parametrize("largest", [1e-37, 1e-40, 1e-45])
def test_fp8_holds_squares_of_the_smallest_numbers(largest):
    """Below what a float32 scale can lift to the largest code: still numbers, off by a code."""
    weights = torch.tensor([0.0, largest, -largest, largest / 4]).repeat(1, 32)
    block = Fp8().encode_matrix(weights)
    decoded = Fp8().decode_matrix(block, 1, 128)
    assert bool(decoded.isfinite().all()) and bool((decoded[weights == 0] == 0).all())
    assert float((decoded - weights).abs().max()) <= max(largest / 16, 1e-41)


@pytest.mark.parametrize("offset", ["minimum", "zero", "symmetric"])
@pytest.mark.parametrize("bits", [8, 4])
def test_integer_codes_decode_by_their_formula(bits, offset):
    """In float64, weight by weight; the even column is the lower half of a byte."""
    kind = Integer(bits, 32, offset)
    codes = torch.randint(0, 2**bits, (5, 64), generator=rng(), dtype=torch.uint8)
    scales = (torch.rand(5, 2, generator=rng()) * 0.01).half()
    minimums = torch.randn(5, 2, generator=rng()).half()
    zeros = torch.randint(0, 2**bits, (5, 2), generator=rng(), dtype=torch.uint8)
    block = {"scales": scales, "minimums": minimums, "zeros": zeros}
    block["codes"] = codes
    if bits == 4:
        block["codes"] = torch.empty(5, 32, dtype=torch.uint8)
        for row in range(5):
            for pair in range(32):
                low, high = int(codes[row, 2 * pair]), int(codes[row, 2 * pair + 1])
                block["codes"][row, pair] = low + 16 * high
        assert torch.equal(pack_pairs(codes), block["codes"])
    scale, code = scales.double().repeat_interleave(32, 1), codes.double()
    expected = {
        "minimum": code * scale + minimums.double().repeat_interleave(32, 1),
        "zero": (code - zeros.double().repeat_interleave(32, 1)) * scale,
        "symmetric": (code - 2 ** (bits - 1)) * scale,
    }[offset]
    own = {name: block[name] for name in kind.matrix_parts(5, 64)}
    assert torch.equal(kind.decode_matrix(own, 5, 64), expected.float())


KINDS = {
    "normal": lambda g: torch.randn(32, 128, generator=g) * 0.02,
    "far from zero": lambda g: torch.randn(32, 128, generator=g) * 0.01 + 3,
    "tiny": lambda g: torch.randn(32, 128, generator=g) * 1e-6,
    "constant": lambda g: torch.full((32, 128), 0.3),
    "zero": lambda g: torch.zeros(32, 128),
    "outliers": lambda g: torch.randn(32, 128, generator=g) ** 5 * 10,
    "large": lambda g: torch.randn(32, 128, generator=g) * 10000,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("offset", ["minimum", "symmetric"])
def test_an_integer_weight_is_off_by_half_a_step_at_most(kind, bits, offset):
    """Against the formula in float64; the step covers the group's range, rounded up to float16."""
    weights = KINDS[kind](rng(bits))
    made = Integer(bits, 64, offset)
    parts = made.encode_matrix(weights)
    step = parts["scales"].double()[..., None]
    groups = weights.double().view(32, 2, 64)
    exact = made.decode_matrix(parts, 32, 128).double().view(32, 2, 64)
    rounding = groups.abs() * 2**-23  # of the float32 that is decoded to
    assert ((exact - groups).abs() <= step / 2 * (1 + 1e-12) + rounding).all()
    low, high = groups.amin(2), groups.amax(2)
    widest = (high - low) / (2**bits - 1)
    if offset == "symmetric":
        widest = 2 * groups.abs().amax(2) / (2**bits - 2)
    ulps = groups.abs().amax(2) * 2**-10 / (2**bits - 1)  # the minimum's own rounding
    assert (step[..., 0] <= widest * (1 + 2**-9) + ulps + 2**-23).all()


def test_minimums_err_less_than_symmetric_codes():
    """On normal weights, at the same bits: why they were chosen."""
    weights = KINDS["normal"](rng(3))

    def error(bits, offset):
        made = Integer(bits, 64, offset)
        return float((made.decode_matrix(made.encode_matrix(weights), 32, 128) - weights).norm())

    assert error(4, "minimum") < 0.87 * error(4, "symmetric")
    assert error(8, "minimum") < 0.92 * error(8, "symmetric")


def test_int4_decodes_by_its_formula():
    """Every code with every scale and shift, in float64: exact."""
    levels = [6, 18, 30, 44, 59, 77, 97, 120]
    levels = torch.tensor([-one for one in levels[::-1]] + levels, dtype=torch.float64)
    codes = torch.arange(16, dtype=torch.uint8).repeat(256, 2)
    scales = torch.arange(256, dtype=torch.uint8)
    zeros = torch.arange(-128, 128, dtype=torch.int8)[torch.randperm(256, generator=rng())]
    block = {"codes": pack_pairs(codes), "scales": scales.view(torch.int8)[:, None]}
    decoded = Int4().decode_matrix(block | {"zeros": zeros[:, None]}, 256, 32)
    # Five bits of exponent, three of mantissa.
    number = scales.double()
    scale = 2.0 ** (number // 8 - 24) * (1 + (number % 8) / 8)
    expected = (levels[codes.int()] - zeros.double()[:, None]) * scale[:, None]
    assert torch.equal(decoded.double(), expected)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "large"])
def test_int4_gives_each_weight_its_nearest_level_and_errs_little(kind):
    """No other code of a group comes nearer; and a sixth of what surrounds it is never missed."""
    weights = KINDS[kind](rng(1))
    parts = Int4().encode_matrix(weights)
    decoded = Int4().decode_matrix(parts, 32, 128)
    groups, found = weights.view(32, 4, 32), decoded.view(32, 4, 32)
    every = torch.stack([
        Int4().decode_matrix(parts | {"codes": torch.full((32, 64), 17 * code).byte()}, 32, 128)
        for code in range(16)
    ])  # fmt: skip
    nearest = (every - weights).abs().amin(0)
    assert torch.equal((decoded - weights).abs(), nearest)
    reach = groups.amax(2).clamp(min=0) - groups.amin(2).clamp(max=0)
    assert ((found - groups).norm(dim=2) <= 0.2 * reach * 32**0.5 / 2).all()
    if kind == "zero":
        assert not decoded.any()


def test_int4_errs_less_than_evenly_spaced_levels_of_as_many_bits():
    """On normal weights, 4.5 bits each: what its levels and its fit are for."""
    weights = torch.randn(64, 256, generator=rng(3)) * 0.02

    def error(made):
        return float((made.decode_matrix(made.encode_matrix(weights), 64, 256) - weights).norm())

    assert error(Int4()) < 0.8 * error(Integer(4, 64))


def test_mxfp4_rounds_to_the_nearest_level():
    """Every weight against all levels of its group's exponent; the largest may be cut to 6."""
    weights = torch.randn(32, 128, generator=rng()) * torch.logspace(-6, 6, 32)[:, None]
    parts = Mxfp4().encode_matrix(weights)
    decoded = Mxfp4().decode_matrix(parts, 32, 128).view(32, 4, 32).double()
    groups = weights.view(32, 4, 32).double()
    exponent = torch.floor(torch.log2(groups.abs().amax(2))) - 2
    assert torch.equal(parts["scales"].double() - 127, exponent)
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    levels = torch.cat([levels, -levels]) * 2 ** exponent[..., None, None]
    nearest = (groups[..., None] - levels).abs().amin(3)
    assert torch.equal((decoded - groups).abs(), nearest)


def test_mxfp4_ties_go_to_the_even_code():
    """With 4 in the group the exponent is 0: 2.5 lies between 2 (even) and 3, 5 between 4 and 6."""
    row = torch.zeros(1, 32)
    row[0, :6] = torch.tensor([4.0, 2.5, 5.0, 0.25, -0.75, 1.25])
    decoded = Mxfp4().decode_matrix(Mxfp4().encode_matrix(row), 1, 32)
    assert decoded[0, :6].tolist() == [4.0, 2.0, 4.0, 0.0, -1.0, 1.0]


def test_fp8_is_off_by_a_sixteenth_of_a_weight():
    """Three bits of mantissa; near zero half the smallest code, of a square's own scale."""
    weights = torch.randn(256, 160, generator=rng()) * torch.logspace(-3, 3, 256)[:, None]
    parts = Fp8().encode_matrix(weights)
    decoded = Fp8().decode_matrix(parts, 256, 160)
    scale = parts["scales"].repeat_interleave(128, 0).repeat_interleave(128, 1)[:256, :160]
    assert ((decoded - weights).abs() <= weights.abs() / 16 + scale * 2**-10).all()
    largest = weights[:128, :128].abs().max()
    assert float(decoded[:128, :128].abs().max()) == pytest.approx(float(largest), rel=1e-6)


TENSORS = (
    Part("gate_up_proj", (64, 96), torch.bfloat16, transposed=True),
    Part("gate_up_proj_bias", (96,), torch.bfloat16),
    Part("down_proj", (48, 64), torch.bfloat16),
)


@pytest.mark.parametrize("name", [n for n in PACKED if n != "mxfp4"])
def test_a_block_is_by_rows_of_the_output_whatever_its_module_does(name):
    """The transposed module's block is that of the matrix turned, and decodes turned back."""
    made = named_format(name)
    weights = {t.name: torch.randn(t.shape, generator=rng()).to(t.dtype) for t in TENSORS}
    block = made.encode(TENSORS, weights)
    for part in made.parts(TENSORS):
        assert (tuple(block[part.name].shape), block[part.name].dtype) == (part.shape, part.dtype)
    assert torch.equal(block["gate_up_proj_bias"], weights["gate_up_proj_bias"])
    turned = made.encode_matrix(weights["gate_up_proj"].float().T.contiguous())
    codes = block["gate_up_proj.codes"].view(torch.uint8)
    assert torch.equal(codes, turned["codes"].view(torch.uint8))
    decoded = made.decode(TENSORS, block)
    for tensor in TENSORS:
        assert tuple(decoded[tensor.name].shape) == tensor.shape
        off = (decoded[tensor.name].float() - weights[tensor.name].float()).norm()
        assert off <= 0.12 * weights[tensor.name].float().norm()


@pytest.mark.parametrize(
    ("name", "bits"),
    [("plain", 16), ("int8", 8.5), ("int4", 4.5), ("int4-g64", 4.25), ("int4-g128", 4.125),
     ("mxfp4", 4.25), ("fp8", 8 + 32 / 128**2)],
)  # fmt: skip
def test_bits_of_a_weight(name, bits):
    """By hand, scales included, for a matrix of whole groups."""
    tensors = (Part("down_proj", (256, 512), torch.bfloat16),)
    assert named_format(name).bits_per_weight(tensors) == bits


def test_a_group_is_cut_to_what_divides_a_row():
    """Rows of 96 have groups of 32 where 64 were asked for; a row of 20 cannot be cut."""
    assert Integer(4).matrix_parts(2, 96)["scales"][0] == (2, 3)
    assert Integer(4, None).matrix_parts(2, 96)["scales"][0] == (2, 1)
    with pytest.raises(UnsupportedModelError, match="multiple of 8"):
        Integer(4).matrix_parts(2, 20)
    with pytest.raises(UnsupportedModelError, match="choose int4 or int8"):
        Mxfp4().matrix_parts(2, 48)


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_a_format_cannot_hold_are_refused(name, value):
    """Not stored as something else."""
    weights = torch.zeros(2, 32)
    weights[1, 3] = value
    with pytest.raises(AttachError, match="without a format"):
        named_format(name).encode_matrix(weights)


def test_plain_blocks_are_the_tensors_themselves():
    """Nothing is copied or changed."""
    weights = {t.name: torch.randn(t.shape, generator=rng()).to(t.dtype) for t in TENSORS}
    assert PLAIN.parts(TENSORS) == TENSORS
    block = PLAIN.encode(TENSORS, weights)
    assert all(block[name].data_ptr() == weights[name].data_ptr() for name in weights)


def test_an_unknown_format_is_refused():
    """The message names those that there are."""
    with pytest.raises(UnsupportedModelError, match=r"int3.*int4.*mxfp4.*fp8"):
        named_format("int3")
