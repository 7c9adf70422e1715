"""Page-locked memory, with a CUDA runtime that only keeps books: what it is told, and when."""

import gc
import mmap

import pytest
import torch
from small_olmoe import tiny_model

from melinoe.errors import BudgetError
from melinoe.moe.experts import find_experts
from melinoe.stores import ram_store
from melinoe.stores.ram_store import PinnedStore


class Books:
    """Locked ranges by address; refuses to lock from call *full* on."""

    def __init__(self, full=None):
        self.locked, self.calls, self.full, self.forgotten = {}, 0, full, 0

    def cudaHostRegister(self, address, size, flags):
        self.calls += 1
        if self.full is not None and self.calls >= self.full:
            return 2
        for begin, length in self.locked.items():
            assert address + size <= begin or begin + length <= address, "ranges overlap"
        self.locked[address] = size
        return 0

    def cudaHostUnregister(self, address):
        del self.locked[address]
        return 0


@pytest.fixture
def books(monkeypatch):
    found = Books()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: found)

    def forget():
        found.forgotten += 1

    monkeypatch.setattr(ram_store, "_forget_error", forget)
    return found


def test_whole_pages_are_locked_and_every_block_lies_in_them(books):
    """Pages that two blocks shared could be locked by one of them only."""
    layers = find_experts(tiny_model())
    store = PinnedStore(layers)
    assert len(books.locked) == len(layers)
    for address, size in books.locked.items():
        assert address % mmap.PAGESIZE == 0 and size % mmap.PAGESIZE == 0
    for layer in layers:
        for expert in range(layer.num_experts):
            for view in store.views(layer.index, expert).values():
                begin = view.data_ptr()
                assert any(
                    address <= begin and begin + view.nbytes <= address + size
                    for address, size in books.locked.items()
                )
    unlocked = ram_store.RamStore(layers)
    assert store.host_bytes == unlocked.host_bytes


def test_weights_come_back_and_memory_is_let_go_with_its_last_view(books):
    """A view may outlive the store."""
    model = tiny_model()
    layers = find_experts(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    store = PinnedStore.from_modules(layers)
    view = store.views(0, 0)["down_proj"]
    expected = before["model.layers.0.mlp.experts.down_proj"][0]
    assert torch.equal(view, expected)
    del store
    gc.collect()
    assert len(books.locked) == 1 and torch.equal(view, expected)
    del view
    gc.collect()
    assert not books.locked


def test_a_refusal_gives_weights_back_lets_go_and_leaves_no_error_behind(books):
    """The next kernel of torch would raise what CUDA still remembers."""
    model = tiny_model()
    layers = find_experts(model)
    assert len(layers) > 1
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    books.full = 2
    with pytest.raises(BudgetError, match="refuses to pin"):
        PinnedStore.from_modules(layers)
    gc.collect()
    assert books.forgotten == 1 and not books.locked
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
