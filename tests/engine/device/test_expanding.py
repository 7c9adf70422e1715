"""The kernel unpacks int8 and int4 blocks, bit for bit, as it copies them into slots."""

import numpy as np
import pytest
import tiny
import torch

from melinoe.engine.device.expanding import ExpandPlan
from melinoe.engine.device.loading import addresses, segments
from melinoe.engine.device.staging import unpacked_slots
from melinoe.errors import AttachError
from melinoe.experts.formats import named_format
from melinoe.moe.experts import find_experts
from melinoe.stores.ram_store import RamStore
from melinoe.stores.store import read_weights

INTERPRETED = True
CPU = torch.device("cpu")


def packed(family, name, dtype):
    """Layers of a tiny model, and a store that holds their experts packed."""
    layers = find_experts(tiny.tiny_model(family, dtype=dtype))
    layers = [layer.stored_as(named_format(name)) for layer in layers]
    return layers, RamStore.from_modules(layers)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_unpacks_what_the_store_reads(family, name, dtype):
    """Biases too, also into transposed slots, between poison that stays."""
    layers, store = packed(family, name, dtype)
    layer, guard, num_slots = layers[0], 64, 3
    around, slots = {}, {}
    for tensor, slot in unpacked_slots(layer, store, num_slots, CPU).items():
        flat = torch.full((slot.numel() + 2 * guard,), -7.0, dtype=dtype)
        around[tensor] = flat
        slots[tensor] = flat[guard:-guard].as_strided(slot.shape, slot.stride(), guard)
    expected = {name: flat.clone() for name, flat in around.items()}
    for chunk_weights, pairs in ((128, [(5, 2), (1, 0)]), (1024, [(3, 0)])):
        plan = ExpandPlan(
            addresses(store, 0, CPU), segments(store, 0), layer.format, layer.tensors, slots,
            chunk_weights=chunk_weights,
        )  # fmt: skip
        lists = torch.tensor(pairs, dtype=torch.int32).T.contiguous()
        plan.launch(lists[0], lists[1], torch.tensor([len(pairs)], dtype=torch.int32))
        for expert, slot in pairs:
            for tensor, weights in read_weights(layer, store, expert).items():
                stride = slots[tensor].stride()
                view = expected[tensor].as_strided(slots[tensor].shape, stride, guard)
                view[slot].copy_(weights)
        for tensor in around:
            assert torch.equal(around[tensor], expected[tensor]), tensor


def test_weights_that_cannot_be_packed_leave_the_model_as_it_was():
    """Even those of the layers before."""
    layers = find_experts(tiny.tiny_model("olmoe"))
    layers = [layer.stored_as(named_format("int4")) for layer in layers]
    with torch.no_grad():
        layers[1].module.down_proj[7, 0, 0] = float("nan")
    before = layers[0].module.gate_up_proj.clone()
    with pytest.raises(AttachError, match="without a format"):
        RamStore.from_modules(layers)
    assert torch.equal(layers[0].module.gate_up_proj, before)
    assert np.isnan(layers[1].module.down_proj[7, 0, 0].item())
