"""The kernels compute experts from slots that hold blocks, of every format and family."""

from contextlib import nullcontext

import pytest
import tiny
import torch
from kernels_on_the_host import on_the_host
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from melinoe.engine.device import packed_kernels
from melinoe.engine.device.packed_kernels import KernelExperts, tiles
from melinoe.experts.format import PLAIN
from melinoe.experts.formats import FORMATS
from melinoe.experts.integer import Integer
from melinoe.moe.compute import StandIn
from melinoe.moe.experts import find_experts

INTERPRETED = True
KINDS = FORMATS | {
    "int8 symmetric": Integer(8, 32, "symmetric"),
    "int4 zeros": Integer(4, 16, "zero"),
    "int4-grow": Integer(4, None),
}


class World:
    """One layer of a tiny model in a format, in slots that hold its experts in another order."""

    def __init__(self, family, kind, dtype=torch.float32, **settings):
        model = tiny.tiny_model(family, dtype=dtype, **settings)
        layer = find_experts(model)[0].stored_as(KINDS[kind])
        self.layer, self.module = layer, layer.module
        self.hidden = next(t for t in layer.tensors if t.name == "down_proj").rows_columns[0]
        self.blocks = []
        for expert in range(layer.num_experts):
            weights = {t.name: getattr(layer.module, t.name)[expert] for t in layer.tensors}
            zero = getattr(layer.format, "offset", None) == "zero"  # our own encoder makes none
            encoder = Integer(4, 16) if zero else layer.format
            made = encoder.encode(layer.tensors, weights)
            if zero:
                for name in [one for one in made if one.endswith("minimums")]:
                    zeros = torch.randint(0, 16, made.pop(name).shape, dtype=torch.uint8)
                    made[name.replace("minimums", "zeros")] = zeros
            self.blocks.append(made)
        torch.manual_seed(1)
        self.order = torch.randperm(layer.num_experts)

    def stand_in(self, experts):
        """Slots with *experts*, in this order."""
        slots = {
            part.name: torch.stack([self.blocks[e][part.name] for e in experts])
            for part in self.layer.parts
        }
        return StandIn(self.module, slots, len(experts))

    def compute(self, hidden, index, weights, experts=None):
        """Compute a choice of experts, from slots in the order *experts*."""
        experts = self.order.tolist() if experts is None else experts
        slot_of = torch.full((self.layer.num_experts,), -1)
        slot_of[torch.tensor(experts)] = torch.arange(len(experts))
        with torch.no_grad():
            return KernelExperts(self.layer)(
                self.stand_in(experts), hidden, slot_of[index], weights
            )

    def expected(self, hidden, index, weights):
        """By the format's own definition and transformers' own function, in float64."""
        decoded = [self.layer.format.decode(self.layer.tensors, block) for block in self.blocks]
        stacks = {
            t.name: torch.stack([one[t.name].double() for one in decoded])
            for t in self.layer.tensors
        }
        stand_in = StandIn(self.module, stacks, self.layer.num_experts)
        with torch.no_grad():
            return ALL_EXPERTS_FUNCTIONS["batched_mm"](
                stand_in, hidden.double(), index, weights.double()
            )

    def drawn(self, tokens, top_k=2, seed=0, dtype=torch.float32):
        """Hidden states, choices and weights."""
        torch.manual_seed(seed)
        chosen = torch.stack([torch.randperm(self.layer.num_experts) for _ in range(tokens)])
        return (
            torch.randn(tokens, self.hidden, dtype=dtype),
            chosen[:, :top_k],
            torch.rand(tokens, top_k, dtype=dtype),
        )


def close(found, expected, bound):
    """Whether the largest difference is below *bound* times the largest number."""
    return (found.double() - expected).abs().max() < bound * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "nemotron_h"])
def test_products_are_those_of_the_format_in_float64(family, kind):
    """In float32 within its rounding: plain gates, gpt-oss's own with biases, and no gate."""
    wide = {"moe_intermediate_size": 32} if family == "nemotron_h" else {}
    world = World(family, kind, **wide)
    given = world.drawn(5)
    with on_the_host():  # which does the same, as test_kernels_on_the_host.py holds
        assert close(world.compute(*given), world.expected(*given), 3e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["plain", "int8", "int4", "mxfp4", "fp8"])
@pytest.mark.usefixtures("two_groups")
def test_half_precision_rounds_what_stands_between_the_projections_and_no_weight(kind, dtype):
    """One rounding of the middle and one of the result; decoded weights are not rounded."""
    world = World("olmoe", kind, dtype)
    given = world.drawn(2, dtype=dtype)
    found = world.compute(*given)
    assert found.dtype == dtype
    assert close(found, world.expected(*given), 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("family", tiny.families())
@pytest.mark.usefixtures("two_groups")
def test_every_family_is_computed(family):
    """Its activation, norm, layout and biases; a control that leaves the experts out is far off."""
    world = World(family, "int8")
    given = world.drawn(3)
    expected = world.expected(*given)
    # By numpy, which does the same (test_kernels_on_the_host.py) where it knows the activation.
    gelu = KernelExperts(world.layer)._activation.startswith("gelu")
    with nullcontext() if gelu else on_the_host():
        assert close(world.compute(*given), expected, 1e-5)
    assert not close(torch.zeros_like(expected), expected, 0.5)


@pytest.mark.parametrize("kind", ["plain", "int4"])
@pytest.mark.usefixtures("two_groups")
def test_bits_depend_on_no_slot_no_batch_and_no_neighbour(kind, monkeypatch):
    """Few and many pairs, slots in any order and number, tokens in any company."""
    monkeypatch.setattr(packed_kernels, "FEW_PAIRS", 32)
    world = World("olmoe", kind)
    hidden, index, weights = world.drawn(36, top_k=1)
    index[:] = torch.where(torch.arange(36) % 4 > 0, 3, 5)[:, None]  # 3 fills more than a tile
    many = world.compute(hidden, index, weights)
    assert torch.equal(world.compute(hidden[:28], index[:28], weights[:28]), many[:28])
    assert torch.equal(world.compute(hidden[3:9], index[3:9], weights[3:9]), many[3:9])
    for experts in ([3], [5, 3], [*range(8)]):
        alone = world.compute(hidden[17:18], index[17:18], weights[17:18], experts=experts)
        assert torch.equal(alone[0], many[17])


def test_tiles_hold_each_pair_once_and_one_slot_each():
    """Sixteen pairs at most; pairs stay in order; tiles that are left are empty."""
    torch.manual_seed(0)
    for pairs, num_slots in ((200, 5), (130, 64), (4096, 8), (3, 200), (160, 1)):
        slots = torch.randint(0, num_slots, (pairs,))
        order, table = tiles(slots, num_slots)
        seen = []
        for slot, begin, end in table.tolist():
            if begin >= end:
                continue
            members = order[begin:end].tolist()
            assert len(members) <= 16 and set(slots[members].tolist()) == {slot}
            assert members == sorted(members)
            seen += members
        assert sorted(seen) == list(range(pairs))


def test_a_plain_layout_may_lie_either_way():
    """gpt-oss keeps its 16-bit matrices as (in, out): they are read where they lie."""
    world = World("gpt_oss", PLAIN.name, torch.bfloat16)
    assert world.layer.tensors[0].transposed
    given = world.drawn(2, dtype=torch.bfloat16)
    assert close(world.compute(*given), world.expected(*given), 0.02)
