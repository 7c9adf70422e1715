"""The stand-ins of the kernels do what the kernels do, in every byte that either writes."""

import numpy as np
import pytest
import torch
from kernels_on_the_host import on_the_host
from test_copying import World as Blocks
from test_packed_kernels import KINDS, World

from melinoe.cache.policy import policy as make_policy
from melinoe.engine.device import packed_kernels
from melinoe.engine.device.decide import DeviceResidency

INTERPRETED = True
TABLES = ("state", "load_expert", "load_slot", "num_loads", "counts")


def decided(policy, dtype):
    """Everything that 16 steps of two layers write, prefetched experts and skips among them."""
    rng = np.random.default_rng(5)
    who = DeviceResidency(
        [9, 6], [5, 4], [lambda: make_policy(policy, **OPTIONS[policy])] * 2, torch.device("cpu")
    )
    written = []
    for turn in range(16):
        for layer, (experts, slots) in enumerate(((9, 5), (6, 4))):
            if turn % 7 == 3:
                who.pull(layer).prefetch(rng.permutation(experts)[:2].tolist())
                who.push(layer)
            few = rng.permutation(experts)[: rng.integers(1, slots + 1)]
            index = torch.from_numpy(rng.choice([*few, -1, experts], size=(3, 2)))
            index = torch.full_like(index, -1) if turn == 11 else index
            weights = torch.from_numpy(rng.random((3, 2))).to(dtype)
            written += who.decide(
                layer, index.to(torch.int32 if turn % 2 else index.dtype), weights
            )
        who.close_step(3)
        written += [getattr(who, name).clone() for name in TABLES]
    return written


OPTIONS = {"lru": {}, "lfu": {"gamma": 0.8}}


@pytest.mark.parametrize(("policy", "dtype"), [("lru", torch.float32), ("lfu", torch.bfloat16)])
def test_decisions_are_those_of_the_kernel(policy, dtype):
    """Slots, weights, lists, state and counters, after each step."""
    interpreted = decided(policy, dtype)
    with on_the_host():
        found = decided(policy, dtype)
    for one, other in zip(found, interpreted, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def test_copies_are_those_of_the_kernel():
    """Experts in slots, guard zones, and chunks of odd sizes, as `Blocks` says they must be."""
    with on_the_host():
        for sizes, align in (([256, 128], 64), ([33, 7, 1], 1), ([2048], 64)):
            world = Blocks(sizes, 5, 4, align, chunk_bytes=64)
            world.load([(3, 1), (0, 2)])
            world.load([(4, 2), (2, 0), (1, 3)])
            world.load([])
            world.check()


@pytest.mark.parametrize(
    ("family", "kind"),
    [("olmoe", kind) for kind in KINDS]
    + [("gpt_oss", kind) for kind in ("plain", "int8", "int4", "int4 zeros", "mxfp4", "fp8")]
    + [("nemotron_h", "plain"), ("nemotron_h", "int4")],
)
def test_products_are_those_of_the_kernel(family, kind, monkeypatch, request):
    """
    To the bit: few pairs, and many, of which a program takes the same whatever the format.

    In 4 bits it is unrolled as on a GPU.
    """
    if kind != "int4":
        request.getfixturevalue("two_groups")
    monkeypatch.setattr(packed_kernels, "FEW_PAIRS", 32)
    wide = {"moe_intermediate_size": 32} if family == "nemotron_h" else {}
    world = World(family, kind, **wide)
    for tokens in (2, 17) if kind in ("plain", "int4") else (2,):
        hidden, _, weights = world.drawn(tokens)
        index = torch.tensor([[3, 5]]).expand(tokens, 2)  # few slots, of more than a tile each
        interpreted = world.compute(hidden, index, weights)
        with on_the_host():
            assert torch.equal(world.compute(hidden, index, weights), interpreted)
