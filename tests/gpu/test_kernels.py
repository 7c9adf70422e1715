"""The fast engine's kernels, compiled for the GPU: the plans of the host, and every byte copied."""

import numpy as np
import pytest
import torch
from on_cuda import EXPERTS, model

from melinoe.cache.packing import pack
from melinoe.cache.policy import policy as make_policy
from melinoe.cache.residency import Residency
from melinoe.engine.device.loading import Loader, addresses
from melinoe.engine.device.residency import DeviceResidency
from melinoe.experts.formats import named_format
from melinoe.moe.experts import find_experts
from melinoe.stores.ram_store import PinnedStore
from melinoe.stores.store import read_weights

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)


def test_kernels_are_compiled():
    """The suite would prove nothing of the GPU through the interpreter."""
    import triton

    assert not triton.knobs.runtime.interpret


@pytest.mark.parametrize("policy", ["lru", "lfu"])
@pytest.mark.parametrize(("experts", "capacity"), [(8, 4), (64, 16), (128, 64), (512, 100)])
def test_the_device_plans_what_the_host_plans(policy, experts, capacity):
    """Compiled, one to four warps: loads, order, slots, state, 200 requests each."""
    rng = np.random.default_rng(experts)
    host = Residency(experts, capacity, policy)
    device = DeviceResidency([experts], [capacity], [lambda: make_policy(policy)], CUDA)
    for _ in range(200):
        few = rng.permutation(experts)[: rng.integers(1, min(capacity, 40) + 1)]
        index = rng.choice(np.append(few, [experts, -1]), size=(rng.integers(1, 5), 8))
        known = np.unique(index[(index >= 0) & (index < experts)])
        plan = host.request(known.tolist())
        weights = torch.rand(index.shape, device=CUDA)
        slots, kept = device.decide(0, torch.from_numpy(index).to(CUDA), weights)
        count = int(device.num_loads[0])
        loads = list(zip(device.load_expert[0, :count].tolist(),
                         device.load_slot[0, :count].tolist(), strict=True))  # fmt: skip
        assert loads == [(load.expert, load.slot) for load in plan.loads]
        assert np.array_equal(device.state[0].cpu().numpy(), pack(host))
        real = torch.from_numpy((index >= 0) & (index < experts))
        assert np.array_equal(slots.cpu()[real].numpy(), host.slot_of[index[real.numpy()]])
        assert torch.equal(kept.cpu(), torch.where(real, weights.cpu(), 0.0))


@pytest.mark.parametrize("stored", ["plain", "int8", "int4"])
def test_experts_arrive_from_pinned_memory_bit_for_bit(stored):
    """Exact bytes or unpacked codes, with slots not listed and guard zones untouched."""
    layers = [layer.stored_as(named_format(stored)) for layer in find_experts(model())]
    layer, store = layers[0], PinnedStore(layers)
    for expert in range(EXPERTS):
        one = {t.name: torch.randn(t.shape).to(t.dtype) for t in layer.tensors}
        store.write(0, expert, layer.format.encode(layer.tensors, one))
    guard, count = 4096, 6
    around = {
        t.name: torch.full((count * t.nbytes // 2 + 2 * guard,), -7.0, dtype=t.dtype, device=CUDA)
        for t in layer.tensors
    }
    slots = {t.name: around[t.name][guard:-guard].view(count, *t.shape) for t in layer.tensors}
    expected = {name: flat.cpu().clone() for name, flat in around.items()}
    loader = Loader(store, layer, addresses(store, 0, CUDA), slots)
    pairs = [(5, 2), (11, 0), (0, 5)]
    lists = torch.tensor(pairs, dtype=torch.int32, device=CUDA).T.contiguous()
    loader.plan.launch(lists[0], lists[1], torch.tensor([3], dtype=torch.int32, device=CUDA))
    for expert, slot in pairs:
        for name, weights in read_weights(layer, store, expert).items():
            expected[name][guard:-guard].view(count, *weights.shape)[slot].copy_(weights)
    for name, flat in around.items():
        assert torch.equal(flat.cpu(), expected[name]), name
