"""The copy kernel moves the listed experts' bytes into their slots, and touches nothing else."""

import pytest
import torch

from melinoe.engine.device.copying import CopyPlan, Segment

INTERPRETED = True
GUARD = 64
POISON = 0xAB


class World:
    """
    Blocks of random bytes at known addresses, and slots between guard zones, all poisoned.

    Args:
        sizes: bytes of each tensor of an expert.
        align: bytes to which tensors in a block, blocks and slots are aligned.
    """

    def __init__(self, sizes, experts, slots, align, **options):
        rng = torch.Generator().manual_seed(sum(sizes))
        offsets, stride = [], 0
        for size in sizes:
            offsets.append(stride)
            stride += -(-size // align) * align
        self.blocks = torch.randint(0, 256, (experts, stride), generator=rng, dtype=torch.uint8)
        self.segments = [
            Segment(f"t{i}", offset, size)
            for i, (offset, size) in enumerate(zip(offsets, sizes, strict=True))
        ]
        self.around = {
            s.name: torch.full((slots * s.nbytes + 2 * GUARD,), POISON, dtype=torch.uint8)
            for s in self.segments
        }
        self.slots = {
            s.name: self.around[s.name][GUARD:-GUARD].view(slots, s.nbytes) for s in self.segments
        }
        begins = [self.blocks[e].data_ptr() for e in range(experts)]
        # Blocks at addresses that neither ascend nor lie side by side: only the table knows.
        self.order = torch.randperm(experts, generator=rng)
        table = torch.tensor(begins)[self.order]
        self.plan = CopyPlan(table, self.segments, self.slots, **options)
        self.expected = {name: tensor.clone() for name, tensor in self.around.items()}

    def load(self, pairs, room=8):
        """Copy (expert, slot) pairs; what follows them in the lists must not matter."""
        lists = torch.full((2, room), 1 << 20, dtype=torch.int32)
        lists[:, : len(pairs)] = torch.tensor(pairs, dtype=torch.int32).reshape(-1, 2).T
        self.plan.launch(lists[0], lists[1], torch.tensor([len(pairs)], dtype=torch.int32))
        for expert, slot in pairs:
            block = self.blocks[self.order[expert]]
            for s in self.segments:
                begin = GUARD + slot * s.nbytes
                self.expected[s.name][begin : begin + s.nbytes] = block[
                    s.offset : s.offset + s.nbytes
                ]

    def check(self):
        for name, tensor in self.around.items():
            assert torch.equal(tensor, self.expected[name]), name


@pytest.mark.parametrize(
    ("sizes", "align"),
    [
        ([256, 128], 64),  # 16-byte loads
        ([200, 40, 8], 8),
        ([36, 12], 4),
        ([34, 2], 2),
        ([33, 7, 1], 1),
        ([2048], 64),  # one tensor, several chunks
    ],
)
@pytest.mark.parametrize("chunk_bytes", [64, 4096])
def test_bytes_arrive_and_nothing_else_changes(sizes, align, chunk_bytes):
    """Exact bytes, slots not listed and guard zones as poisoned before; then slots overwritten."""
    world = World(sizes, 5, 4, align, chunk_bytes=chunk_bytes)
    world.load([(3, 1), (0, 2)])
    world.check()
    world.load([(4, 2), (2, 0), (1, 3)])
    world.check()


def test_an_empty_list_copies_nothing():
    """Whatever stale entries the list still has."""
    world = World([128, 64], 3, 2, 64)
    world.load([])
    world.check()


@pytest.mark.parametrize("programs", [1, 2, 7, 64])
def test_any_number_of_programs_shares_the_work(programs):
    """Fewer than the chunks, and more."""
    world = World([1000, 24], 4, 3, 8, programs=programs, chunk_bytes=128)
    world.load([(2, 0), (1, 1), (3, 2)])
    world.check()


def test_the_widest_word_that_alignment_allows_is_used():
    """16-byte vectors for real expert sizes, bytes only where sizes are odd."""
    for sizes, align, word, vector in (([4096], 64, 8, 2), ([40], 8, 8, 1), ([33], 1, 1, 1)):
        plan = World(sizes, 2, 2, align).plan
        # The allocator may place a block better than its size asks for, never worse.
        assert (plan._size, plan._vector) == (word, vector)


def test_slots_that_are_not_contiguous_are_refused():
    """Their addresses would not be multiples of the size."""
    with pytest.raises(ValueError, match="contiguous"):
        CopyPlan(torch.tensor([0]), [Segment("t", 0, 4)], {"t": torch.zeros(4, 2)[:, :1]})
