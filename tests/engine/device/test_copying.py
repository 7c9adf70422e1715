"""The copy kernel moves the listed experts' bytes into their slots, and touches nothing else."""

import pytest
import torch

from melinoe.engine.device.copying import Loader, addresses

INTERPRETED = True
GUARD = 64
POISON = 0xAB


class World:
    """
    Blocks of random bytes, a store of them, and slots between guard zones, all poisoned.

    Args:
        sizes: bytes of each tensor of an expert.
        align: bytes to which tensors in a block, blocks and slots are aligned.
    """

    def __init__(self, sizes, experts, slots, align, **options):
        rng = torch.Generator().manual_seed(sum(sizes))
        self.parts, stride = {}, 0
        for number, size in enumerate(sizes):
            self.parts[f"t{number}"] = slice(stride, stride + size)
            stride += -(-size // align) * align
        blocks = torch.randint(0, 256, (experts, stride), generator=rng, dtype=torch.uint8)
        # Addresses that neither ascend nor lie side by side.
        self.blocks = [blocks[expert] for expert in torch.randperm(experts, generator=rng)]
        self.kept, self.kind = blocks, "ram"
        self.around, self.slots = {}, {}
        for (name, _), size in zip(self.parts.items(), sizes, strict=True):
            flat = torch.full((slots * size + 2 * GUARD,), POISON, dtype=torch.uint8)
            self.around[name], self.slots[name] = flat, flat[GUARD:-GUARD].view(slots, size)
        where = addresses(self, 0, torch.device("cpu"))
        self.loader = Loader(self, 0, where, self.slots, **options)
        self.expected = {name: tensor.clone() for name, tensor in self.around.items()}

    def num_experts(self, layer):
        return len(self.blocks)

    def views(self, layer, expert):
        return {name: self.blocks[expert][part] for name, part in self.parts.items()}

    def load(self, pairs, room=8):
        """Copy (expert, slot) pairs; what follows them in the lists must not matter."""
        lists = torch.full((2, room), 1 << 20, dtype=torch.int32)
        lists[:, : len(pairs)] = torch.tensor(pairs, dtype=torch.int32).reshape(-1, 2).T
        self.loader.load_listed(lists[0], lists[1], torch.tensor([len(pairs)], dtype=torch.int32))
        for expert, slot in pairs:
            for name, part in self.views(0, expert).items():
                begin = GUARD + slot * part.nbytes
                self.expected[name][begin : begin + part.nbytes] = part

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
        loader = World(sizes, 2, 2, align).loader
        # The allocator may place a block better than its size asks for, never worse.
        assert (loader.word_bytes, loader.vector) == (word, vector)


def test_slots_that_are_not_contiguous_are_refused():
    """Their addresses would not be multiples of the size."""
    world = World([4], 2, 2, 4)
    where = addresses(world, 0, torch.device("cpu"))
    with pytest.raises(ValueError, match="contiguous"):
        Loader(world, 0, where, {"t0": torch.zeros(2, 8, dtype=torch.uint8)[:, :4]})
