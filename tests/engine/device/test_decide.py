"""The device decides as `cache.Residency` decides: the same loads, slots, order and counts."""

import numpy as np
import pytest
import torch

from melinoe.cache.counters import Counters
from melinoe.cache.packing import pack, unpack
from melinoe.cache.policy import policy as make_policy
from melinoe.cache.residency import Residency
from melinoe.engine.device.decide import MOST_PAIRS, DeviceResidency
from melinoe.errors import AttachError, MelinoeError

INTERPRETED = True
POLICIES = {
    "lru": lambda: make_policy("lru"),
    "lfu": lambda: make_policy("lfu"),
    "lfu, no forgetting": lambda: make_policy("lfu", gamma=1.0),
    "lfu, quick forgetting": lambda: make_policy("lfu", gamma=0.001),
}
POISON = -77


class Lanes:
    """Many independent layers, planned at once on the device and one by one on the host."""

    def __init__(self, policy, experts, capacity, lanes):
        sizes = [experts] * lanes, [capacity] * lanes
        self.device = DeviceResidency(*sizes, [POLICIES[policy]] * lanes, torch.device("cpu"))
        self.hosts = [Residency(experts, capacity, POLICIES[policy]()) for _ in range(lanes)]
        self.expected = np.zeros((lanes, 4), dtype=np.int64)
        self.experts, self.capacity, self.lanes = experts, capacity, lanes

    def step(self, index):
        """One request per lane, int64 (lanes, tokens, top_k); compares everything."""
        device, experts = self.device, self.experts
        device.load_expert.fill_(POISON)
        device.load_slot.fill_(POISON)
        weights = torch.rand(index.shape)
        slots, kept = device.decide(0, index, weights, self.lanes)
        known = (index >= 0) & (index < experts)
        assert torch.equal(kept, torch.where(known, weights, 0.0))
        assert ((slots >= 0) & (slots < self.capacity)).all()
        index, slots, known, state, num_loads, load_expert, load_slot = (
            one.numpy()
            for one in (index, slots, known, device.state, device.num_loads, device.load_expert,
                        device.load_slot)
        )  # fmt: skip
        for lane, host in enumerate(self.hosts):
            ids = index[lane][known[lane]]
            distinct, uses = np.unique(ids, return_counts=True)
            hits = uses[host.slot_of[distinct] >= 0].sum()
            plan = host.request(distinct.tolist())
            count = len(plan.loads)
            assert num_loads[lane] == count
            assert load_expert[lane].tolist() == (
                [load.expert for load in plan.loads] + [POISON] * (self.capacity - count)
            )
            assert load_slot[lane, :count].tolist() == [load.slot for load in plan.loads]
            assert (state[lane] == pack(host)).all()
            assert (slots[lane][known[lane]] == host.slot_of[ids]).all()
            self.expected[lane] += (len(ids), hits, count, len(distinct) > 0)
        assert np.array_equal(device.counts[:-1].numpy(), self.expected)


def random_index(rng, lanes, tokens, top_k, experts, capacity, skip=0.1):
    """Choices of at most *capacity* distinct experts per lane, repeats and skips among them."""
    index = np.empty((lanes, tokens, top_k), dtype=np.int64)
    for lane in range(lanes):
        few = rng.permutation(experts)[: rng.integers(1, capacity + 1)]
        index[lane] = rng.choice(few, size=(tokens, top_k))
    nobody = rng.random(index.shape) < skip
    index[nobody] = rng.choice([-1, experts, experts + 3], size=nobody.sum())
    return torch.from_numpy(index)


SIZES = [  # experts, capacity, tokens, top_k
    (8, 4, 2, 2),
    (8, 2, 1, 2),  # K = C
    (8, 8, 4, 3),  # C = E
    (64, 16, 1, 8),
    (1, 1, 3, 1),
    (6, 5, 16, 2),  # no powers of two, batch 16
    (33, 7, 5, 4),
]


@pytest.mark.parametrize(
    ("policy", "experts", "capacity", "tokens", "top_k"),
    [(policy, *sizes) for policy in ("lru", "lfu") for sizes in SIZES]
    + [(f"lfu, {how} forgetting", *sizes) for how in ("no", "quick") for sizes in SIZES[-2:]],
)
def test_the_device_plans_what_the_host_plans(policy, experts, capacity, tokens, top_k):
    """Loads, their order and slots, renumbering, state and counts, in 32 sequences at once."""
    rng = np.random.default_rng(experts * 100 + tokens)
    lanes = Lanes(policy, experts, capacity, 32)
    for _ in range(6):
        lanes.step(random_index(rng, 32, tokens, top_k, experts, capacity))


@pytest.mark.parametrize("policy", POLICIES)
def test_every_short_sequence_is_planned_alike(policy):
    """All 4^5 sequences of one expert of four, at two slots: ties and evictions in every order."""
    steps = 5  # 4^5 lanes, a power of two as the kernel wants it
    every = torch.cartesian_prod(*[torch.arange(4)] * steps)
    lanes = Lanes(policy, 4, 2, len(every))
    for step in range(steps):
        lanes.step(every[:, step].reshape(-1, 1, 1))


def test_512_experts_are_planned_alike():
    """The most the kernel takes, in several warps on a GPU."""
    rng = np.random.default_rng(1)
    for policy in ("lru", "lfu"):
        lanes = Lanes(policy, 512, 20, 4)
        for _ in range(3):
            lanes.step(random_index(rng, 4, 3, 22, 512, 20))


def test_scores_are_rescaled_alike():
    """Past 2**512 the unit falls back near 1; what was last used long before comes to score 0."""
    lanes = Lanes("lfu, quick forgetting", 4, 2, 1)
    policy = lanes.hosts[0].policy
    lanes.step(torch.tensor([[[3]]]))
    for _ in range(3):
        # As if 50 requests of nobody's interest had passed: the unit grows, scores stay.
        policy._now *= 1000.0**50
        lanes.device.state[0] = torch.from_numpy(pack(lanes.hosts[0]))
        for expert in (0, 1, 2, 1):
            before = policy._now
            lanes.step(torch.tensor([[[expert]]]))
            if policy._now < before:
                break
        else:
            raise AssertionError("the unit was never rescaled")
        lanes.step(torch.tensor([[[2]]]))
    assert policy._rank[3] == 0 < policy._rank[2]


def test_a_request_of_nobody_changes_nothing():
    """All choices skipped: no request, no tick of the clock, no count."""
    for policy in POLICIES:
        lanes = Lanes(policy, 4, 2, 2)
        lanes.step(torch.tensor([[[0], [1]], [[2], [2]]]))
        before = lanes.device.state.clone()
        lanes.step(torch.full((2, 2, 1), 4))
        lanes.step(torch.full((2, 2, 1), -1))
        assert torch.equal(lanes.device.state, before)
        assert lanes.device.counts[:-1, 3].tolist() == [1, 1]


@pytest.mark.parametrize("policy", POLICIES)
def test_host_and_device_may_take_turns(policy):
    """Steps on the device, prefetches and requests on the host, in turn, as on the host alone."""
    rng = np.random.default_rng(2)
    alone = Residency(9, 4, POLICIES[policy]())
    device = DeviceResidency([9], [4], [POLICIES[policy]], torch.device("cpu"))
    for turn in range(40):
        experts = sorted(rng.permutation(9)[: rng.integers(1, 5)].tolist())
        if turn % 3 == 0:
            assert device.pull(0).prefetch(experts) == alone.prefetch(experts)
            device.push(0)
        elif turn % 3 == 1:
            assert device.pull(0).request(experts) == alone.request(experts)
            device.push(0)
        else:
            device.decide(0, torch.tensor([experts]), torch.ones(1, len(experts)))
            alone.request(experts)
        assert np.array_equal(device.state[0].numpy(), pack(alone))
    device.reset()
    alone.reset()
    assert np.array_equal(device.state[0].numpy(), pack(alone))


def test_packing_loses_nothing_and_refuses_what_it_cannot_hold():
    """A residency unpacked from a row evicts as the one that was packed."""
    first = Residency(6, 3, "lfu")
    for experts in ([0, 1], [2, 3], [1], [4, 5]):
        first.request(experts)
    second = Residency(6, 3, "lfu")
    unpack(pack(first), second)
    second.check_invariants()
    assert second.request([0, 2]) == first.request([0, 2])
    other = Residency(6, 3, make_policy("belady", future=[[0]]))
    with pytest.raises(MelinoeError, match="reference engine"):
        pack(other)
    with pytest.raises(MelinoeError, match="reference engine"):
        unpack(pack(first), other)
    with pytest.raises(ValueError, match="not of this residency"):
        unpack(pack(first)[:-1], second)


def test_layers_of_different_sizes_share_the_tensors():
    """Two layers of 5 and 8 experts, by hand: each evicts by its own uses; passes are counted."""
    device = DeviceResidency([5, 8], [2, 3], [POLICIES["lru"]] * 2, torch.device("cpu"))
    hand = [  # tokens' choices per layer, loads per layer as (expert, slot)
        (([[0, 1]], [[7, 6]]), ([(0, 0), (1, 1)], [(6, 0), (7, 1)])),
        (([[1, 1]], [[5, 6]]), ([], [(5, 2)])),
        (([[4, 1]], [[0, 5]]), ([(4, 0)], [(0, 1)])),
        (([[4, 1]], [[0, 5]]), ([], [])),
    ]
    for chosen, loads in hand:
        for layer in (0, 1):
            device.decide(layer, torch.tensor(chosen[layer]), torch.ones(1, 2))
            count = int(device.num_loads[layer])
            experts, slots = device.load_expert[layer, :count], device.load_slot[layer, :count]
            assert list(zip(experts.tolist(), slots.tolist(), strict=True)) == loads[layer]
        device.close_step(1)
    expected = Counters(2)
    for uses, hits, loaded in (((2, 2), (0, 0), (2, 2)), ((2, 2), (2, 1), (0, 1)),
                               ((2, 2), (1, 1), (1, 1)), ((2, 2), (2, 2), (0, 0))):  # fmt: skip
        expected.begin_forward("completion", 1)
        for layer in (0, 1):
            expected.add_request(layer, uses[layer], hits[layer], loaded[layer])
        expected.end_forward()
    assert device.counters() == expected
    assert device.fits(1, 2) and not device.fits(2, 2)


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_a_batch_of_prompts_is_planned_alike(policy):
    """2,400 pairs with every expert resident: more are taken at a time; skips among them."""
    rng = np.random.default_rng(3)
    lanes = Lanes(policy, 64, 64, 1)
    for tokens in (300, 33, 300):
        lanes.step(torch.from_numpy(rng.integers(-1, 66, size=(1, tokens, 8))))


def test_counts_of_the_largest_request_are_right():
    """65,535 pairs of one expert fill 16 bits; one more is not the device's to plan."""
    who = DeviceResidency([4], [4], [POLICIES["lru"]], torch.device("cpu"))
    for pairs in (1, MOST_PAIRS):
        who.decide(0, torch.zeros(pairs, 1, dtype=torch.int64), torch.ones(pairs, 1))
    assert who.counts[0, :3].tolist() == [1 + MOST_PAIRS, MOST_PAIRS, 1]
    assert who.fits(MOST_PAIRS, 1) and not who.fits(MOST_PAIRS + 1, 1)
    assert who.fits(8191, 8) and not who.fits(8192, 8)


def test_too_many_experts_are_refused():
    """The message names the way out."""
    with pytest.raises(AttachError, match="reference"):
        DeviceResidency([513], [4], [POLICIES["lru"]], torch.device("cpu"))
