"""Stores, transfers and budgets, below the level of a model."""

import pytest
import tiny
import torch

from melinoe import attach
from melinoe.cache.residency import Load
from melinoe.engine.budget import memory_of, slots_for
from melinoe.engine.transfer import EmulatedLink, Transfer
from melinoe.errors import BudgetError
from melinoe.host_memory import format_bytes, parse_bytes
from melinoe.moe.experts import find_experts
from melinoe.stores.ram_store import RamStore
from melinoe.stores.store import Store

PROMPT = torch.tensor([[5, 6, 7, 8, 9, 10]])


def slots_like(layer, count):
    return [
        {t.name: torch.zeros(t.shape, dtype=t.dtype) for t in layer.tensors} for _ in range(count)
    ]


def test_a_ram_store_reads_back_what_a_module_held():
    """Biased, transposed gpt_oss: all four stacked parameters, freed in the module."""
    model = tiny.tiny_model("gpt_oss")
    layers = find_experts(model)
    held = [
        {t.name: layer.module.get_parameter(t.name).detach().clone() for t in layer.tensors}
        for layer in layers
    ]
    assert set(held[0]) == {"gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"}
    store = RamStore.from_modules(layers)
    assert isinstance(store, Store)
    for layer, of_layer in zip(layers, held, strict=True):
        assert all(p.numel() == 0 for p in layer.module.parameters(recurse=False))
        for expert in range(layer.num_experts):
            (slot,) = slots_like(layer, 1)
            store.read(layer.index, expert, slot)
            for name, stacked in of_layer.items():
                assert torch.equal(slot[name], stacked[expert])


def test_a_ram_store_takes_little_more_than_the_experts(model):
    """Blocks are contiguous: padding is below 64 bytes a tensor."""
    layers = find_experts(model)
    store = RamStore(layers)
    bare = sum(layer.num_experts * layer.block_bytes for layer in layers)
    assert (
        bare <= store.host_bytes < bare + 64 * sum(len(x.tensors) * x.num_experts for x in layers)
    )


def test_a_store_that_fails_gives_the_weights_back(model, monkeypatch):
    """Room for one layer of two: the first layer's weights return."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    real, calls = RamStore._allocate, []

    def allocate(self, *size):
        calls.append(size)
        if len(calls) == 2:
            raise BudgetError("no more")
        return real(self, *size)

    monkeypatch.setattr(RamStore, "_allocate", allocate)
    with pytest.raises(BudgetError, match="no more"):
        attach(model, slots=2)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_layers_that_share_their_weights_are_both_served_and_restored(model):
    """Tied experts are stored for each layer, and are still tied afterwards."""
    tied = tiny.tiny_model("olmoe")
    first, second = (layer.module for layer in find_experts(tied))
    second.down_proj = first.down_proj
    before = first.down_proj.detach().clone()
    with torch.no_grad():
        expected = tied(PROMPT).logits
        with attach(tied, slots=2):
            assert torch.equal(tied(PROMPT).logits, expected)
    assert second.down_proj is first.down_proj
    assert torch.equal(first.down_proj, before)


# --- the emulated link ------------------------------------------------------------------------


def test_an_emulated_link_takes_its_time(clock):
    """Three transfers of 1 MB at 100 MB/s and 2 ms: 12 ms each, one after the other."""
    link = EmulatedLink(100e6, 2e-3)
    arrivals = [link.issue(1_000_000) for _ in range(3)]
    assert arrivals == pytest.approx([0.012, 0.024, 0.036], abs=1e-5)


def test_demand_waits_for_the_emulated_link_and_says_so(model, clock):
    """Two loads of 12 KiB at 1 MB/s: 24.6 ms, all of it stall."""
    layer = find_experts(model)[0]
    store = RamStore([layer])
    transfer = Transfer(store, EmulatedLink(1e6))
    loads = [Load(0, 0, None), Load(1, 1, None)]
    transfer.wait(transfer.issue(0, loads, slots_like(layer, 2), stalls=True))
    assert clock.now == pytest.approx(2 * layer.block_bytes / 1e6, rel=0.01)
    assert transfer.stall_s == pytest.approx(clock.now, rel=0.01)
    assert transfer.transferred_bytes == 2 * layer.block_bytes


def test_generation_over_an_emulated_link_is_no_faster_than_the_link(model, clock):
    """Every load costs its latency, and the tokens stay the same."""
    greedy = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(PROMPT, **greedy)
    with attach(model, slots=2, link=EmulatedLink(1e9, 1e-3)) as handle:
        assert torch.equal(model.generate(PROMPT, **greedy), expected)
        assert clock.now >= handle.stall_s >= 1e-3 * handle.counters.loads.sum() > 0


def test_a_prefetch_returns_at_once_and_its_use_waits(model, clock):
    """The prefetch itself does not stall; the first pass that needs its experts does."""
    wanted = [list(range(tiny.NUM_EXPERTS))] * 2
    with attach(model, slots=tiny.NUM_EXPERTS, link=EmulatedLink(1e12, 0.03)) as handle:
        handle.prefetch(wanted)
        assert clock.now < 0.03 and handle.stall_s == 0  # 16 transfers of 30 ms take 0.48 s
        with torch.no_grad():
            model(PROMPT)
        assert handle.counters.loads.sum() == 0
        # The prompt uses experts of the second half.
        assert 0.2 < handle.stall_s <= clock.now < 0.49


# --- budgets ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("8GiB", 8 * 2**30),
        ("500MB", 500_000_000),
        ("1.5 gib", 3 * 2**29),
        ("0.1KB", 100),
        ("1024", 1024),
        (7, 7),
    ],
)
def test_amounts_of_memory_are_read(text, amount):
    """Binary and decimal units, any case, a space, fractions."""
    assert parse_bytes(text) == amount


@pytest.mark.parametrize(
    "text", ["", "8 elephants", "-1GiB", "GiB", "0", 0, "0.0001B", "1e9", True]
)
def test_what_is_no_amount_of_memory_is_refused(text):
    """The message shows how to write one."""
    with pytest.raises(BudgetError, match="8GiB"):
        parse_bytes(text)


@pytest.mark.parametrize("extra", [0, 1, 12287])
@pytest.mark.parametrize("slots", range(1, 9))
def test_slots_are_the_most_that_stay_within_the_budget(model, slots, extra):
    """Two layers of 12 KiB experts: one more slot would take 24 KiB more."""
    layers = find_experts(model)
    budget = slots * 2 * 12288 + extra
    assert slots_for(budget, layers) == slots
    assert memory_of(slots, layers) <= budget


def test_a_budget_below_one_slot_per_layer_names_the_smallest(model):
    """24,576 bytes work, 24,575 do not."""
    layers = find_experts(model)
    assert slots_for(24576, layers) == 1
    with pytest.raises(BudgetError, match=r"at least 24576 bytes \(24KiB\)"):
        slots_for(24575, layers)


def test_a_printed_amount_is_never_too_small():
    """Rounded up, so that what a message asks for suffices."""
    for amount in (1, 1023, 1025, 2**20 + 1, 3 * 2**30 - 1, 12_884_901_889):
        assert parse_bytes(format_bytes(amount)) >= amount
