"""The device engine's kernels, compiled for the GPU: the host's plans, and every byte copied."""

import numpy as np
import pytest
import torch
from on_cuda import EXPERTS, model
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from melinoe.cache.packing import pack
from melinoe.cache.policy import policy as make_policy
from melinoe.cache.residency import Residency
from melinoe.engine.device.copying import Loader, addresses
from melinoe.engine.device.decide import DeviceResidency
from melinoe.engine.device.packed_kernels import KernelExperts
from melinoe.experts.formats import named_format
from melinoe.moe.compute import StandIn
from melinoe.moe.experts import find_experts
from melinoe.stores.ram_store import PinnedStore
from melinoe.stores.store import read_block

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


def stored_as(name):
    """One layer of the model, and a pinned store of random experts in a format."""
    layers = [layer.stored_as(named_format(name)) for layer in find_experts(model())]
    store = PinnedStore(layers)
    for expert in range(EXPERTS):
        one = {t.name: torch.randn(t.shape).to(t.dtype) for t in layers[0].tensors}
        store.write(0, expert, layers[0].format.encode(layers[0].tensors, one))
    return layers[0], store


@pytest.mark.parametrize("stored", ["plain", "int4", "fp8"])
def test_experts_arrive_from_pinned_memory_bit_for_bit(stored):
    """Exact bytes, with slots not listed and guard zones untouched."""
    layer, store = stored_as(stored)
    guard, count = 4096, 6
    around = {
        part.name: torch.full((count * part.nbytes + 2 * guard,), 171, dtype=torch.uint8).to(CUDA)
        for part in layer.parts
    }
    slots = {
        part.name: around[part.name][guard:-guard].view(part.dtype).view(count, *part.shape)
        for part in layer.parts
    }
    expected = {name: flat.cpu().clone() for name, flat in around.items()}
    loader = Loader(store, 0, addresses(store, 0, CUDA), slots)
    pairs = [(5, 2), (11, 0), (0, 5)]
    lists = torch.tensor(pairs, dtype=torch.int32, device=CUDA).T.contiguous()
    loader.load_listed(lists[0], lists[1], torch.tensor([3], dtype=torch.int32, device=CUDA))
    for expert, slot in pairs:
        for name, part in read_block(layer, store, expert).items():
            into = expected[name][guard:-guard].view(count, -1)[slot]
            into.copy_(part.reshape(-1).view(torch.uint8))
    for name, flat in around.items():
        assert torch.equal(flat.cpu(), expected[name]), name


@pytest.mark.parametrize("stored", ["plain", "int8", "int4", "mxfp4", "fp8"])
def test_products_are_those_of_the_format_and_know_no_company(stored):
    """Within bfloat16 of float64; a token's bits alone, among few and among many are the same."""
    layer, store = stored_as(stored)
    blocks = [read_block(layer, store, expert) for expert in range(EXPERTS)]
    slots = {p.name: torch.stack([b[p.name] for b in blocks]).to(CUDA) for p in layer.parts}
    stand_in, experts = StandIn(layer.module, slots, EXPERTS), KernelExperts(layer)
    hidden = next(t for t in layer.tensors if t.name == "down_proj").rows_columns[0]
    torch.manual_seed(0)
    x = torch.randn(300, hidden, device=CUDA, dtype=layer.tensors[0].dtype)
    index = torch.stack([torch.randperm(EXPERTS)[:2] for _ in range(300)]).to(CUDA)
    weights = torch.rand(300, 2, device=CUDA)
    found = experts(stand_in, x, index, weights)
    for few in (1, 3, 64):
        assert torch.equal(experts(stand_in, x[:few], index[:few], weights[:few]), found[:few])
    decoded = [layer.format.decode(layer.tensors, block) for block in blocks]
    stacks = {t.name: torch.stack([d[t.name].double() for d in decoded]) for t in layer.tensors}
    exact = ALL_EXPERTS_FUNCTIONS["batched_mm"](
        StandIn(layer.module, stacks, EXPERTS), x[:8].double().cpu(), index[:8].cpu(),
        weights[:8].double().cpu(),
    )  # fmt: skip
    error = (found[:8].double().cpu() - exact).abs().max() / exact.abs().max()
    assert error < 4 * torch.finfo(x.dtype).eps
